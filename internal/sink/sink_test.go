package sink

import (
	"context"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"sallyport/internal/audit"
)

// A collector keeps what it is sent, unless it is told to fail.
type collector struct {
	*httptest.Server
	ca   string
	down atomic.Bool
	// forget keeps a batch and then fails: the sender cannot know.
	forget atomic.Bool
	// came is sent to when a batch has come.
	came chan struct{}

	mu    sync.Mutex
	lines []string
	auth  string
}

func newCollector(t *testing.T) *collector {
	c := &collector{ca: filepath.Join(t.TempDir(), "ca.pem"), came: make(chan struct{}, 1)}
	c.Server = httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b, err := io.ReadAll(r.Body)
		if err != nil || c.down.Load() {
			w.WriteHeader(http.StatusServiceUnavailable)
			return
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		c.auth = r.Header.Get("Authorization")
		c.lines = append(c.lines, strings.SplitAfter(strings.TrimSuffix(string(b), "\n"), "\n")...)
		select {
		case c.came <- struct{}{}:
		default: // who waits looks at all that is there
		}
		if c.forget.Swap(false) {
			w.WriteHeader(http.StatusBadGateway)
		}
	}))
	t.Cleanup(c.Close)
	b := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Certificate().Raw})
	if err := os.WriteFile(c.ca, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return c
}

// seqs are the numbers of the records in the order in which they came.
func (c *collector) seqs(t *testing.T) (out []uint64) {
	t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, l := range c.lines {
		var r struct {
			Seq uint64 `json:"seq"`
		}
		if err := json.Unmarshal([]byte(l), &r); err != nil {
			t.Fatalf("%q: %v", l, err)
		}
		out = append(out, r.Seq)
	}
	return out
}

// until waits for something that batches bring about.
func (c *collector) until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for late := time.After(30 * time.Second); !ok(); {
		select {
		case <-c.came:
		case <-late:
			t.Fatalf("%s did not come; %d lines did", what, len(c.seqs(t)))
		}
	}
}

func (c *collector) await(t *testing.T, last uint64) []uint64 {
	t.Helper()
	c.until(t, fmt.Sprint("record ", last), func() bool { return slices.Contains(c.seqs(t), last) })
	return c.seqs(t)
}

func openLog(t *testing.T) (*audit.Log, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "audit.jsonl")
	l, err := audit.Open(audit.Config{Path: path, Log: slog.New(slog.DiscardHandler), MaxFile: 64 << 10})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l, path
}

func record(t *testing.T, l *audit.Log, n int) {
	t.Helper()
	for i := range n {
		if err := l.Append(&audit.Record{Kind: audit.KindAdmin, Verb: fmt.Sprint("act ", i)}); err != nil {
			t.Fatal(err)
		}
	}
}

// start runs a sink until stop is called.
func start(t *testing.T, cfg Config, path string) (stop func()) {
	t.Helper()
	s, err := New(cfg, path, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	s.retryMin, s.retryMax = time.Millisecond, 10*time.Millisecond
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(stop)
	return stop
}

func TestOutageLosesNothing(t *testing.T) {
	c := newCollector(t)
	log, path := openLog(t)
	token := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(token, []byte("s3cret\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg := Config{Name: "logs", URL: c.URL, CA: c.ca, TokenFile: token}
	stop := start(t, cfg, path)
	record(t, log, 10)
	c.await(t, 10)
	c.down.Store(true)
	record(t, log, 3000) // over several files, while nobody takes them
	stop()
	stop = start(t, cfg, path)
	c.down.Store(false)
	got := c.await(t, 3010)
	// A batch under way when the sink was stopped may have come as well.
	newest := uint64(0)
	for i, seq := range got {
		if seq > newest+1 {
			t.Fatalf("line %d is record %d, after %d", i+1, seq, newest)
		}
		newest = max(newest, seq)
	}
	if c.auth != "Bearer s3cret" {
		t.Errorf("authorization %q", c.auth)
	}
	n := len(got)
	c.forget.Store(true)
	record(t, log, 1)
	c.until(t, "what was not answered, again,", func() bool { return len(c.seqs(t)) >= n+2 })
	if got := c.seqs(t)[n:]; !slices.Equal(got, []uint64{3011, 3011}) {
		t.Errorf("after an answer that was lost came %v", got)
	}
	stop()
	start(t, cfg, path)
	record(t, log, 1)
	if got := c.await(t, 3012); got[len(got)-1] != 3012 {
		t.Errorf("after a restart came %v", got[n:])
	}
}

func TestOCSFIsDelivered(t *testing.T) {
	c := newCollector(t)
	log, path := openLog(t)
	record(t, log, 1)
	start(t, Config{Name: "o", URL: c.URL, CA: c.ca, Format: "ocsf"}, path)
	c.until(t, "an event of class 6003", func() bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		return strings.Contains(strings.Join(c.lines, ""), `"class_uid":6003`)
	})
}

func TestMistakes(t *testing.T) {
	for _, tt := range []struct {
		c    Config
		want string
	}{
		{Config{URL: "https://a.test"}, "name"}, {Config{Name: "A/../b", URL: "https://a.test"}, "name"},
		{Config{Name: "a"}, "url"}, {Config{Name: "a", URL: "http://a.test"}, "https"}, {Config{Name: "a", URL: "https://u:p@a.test"}, "password"},
		{Config{Name: "a", URL: "https://a.test", Format: "x"}, "format"},
	} {
		if err := tt.c.Validate(); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%+v: %v, want %s", tt.c, err, tt.want)
		}
	}
	good := Config{Name: "a", URL: "http://127.0.0.1:9"}
	if err := (ListConfig{[]Config{good, good}}).Validate(); err == nil || !strings.Contains(err.Error(), "audit.sinks[1]: name") {
		t.Error(err)
	}
}
