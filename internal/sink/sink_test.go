package sink

import (
	"context"
	"encoding/json"
	"encoding/pem"
	"errors"
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
	"sallyport/internal/telemetry"
)

// A collector keeps what it is sent, unless it is told to fail.
type collector struct {
	*httptest.Server
	ca   string
	down atomic.Bool
	// poison is what a line holds that is refused, and its batch with it.
	poison string
	// forget is what a line holds whose batch is kept and then fails, once: the
	// sender cannot know.
	forget atomic.Pointer[string]
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
		if c.poison != "" && strings.Contains(string(b), c.poison) {
			w.WriteHeader(http.StatusBadRequest)
			return
		}
		c.lines = append(c.lines, strings.SplitAfter(strings.TrimSuffix(string(b), "\n"), "\n")...)
		select {
		case c.came <- struct{}{}:
		default: // who waits looks at all that is there
		}
		if f := c.forget.Load(); f != nil && strings.Contains(string(b), *f) && c.forget.CompareAndSwap(f, nil) {
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
	for late := time.After(2 * time.Minute); !ok(); {
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
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- l.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := errors.Join(<-done, l.Close()); err != nil {
			t.Error(err)
		}
	})
	return l, path
}

func write(t *testing.T, l *audit.Log, n int) {
	t.Helper()
	for i := range n {
		if err := l.Append(&audit.Record{Kind: audit.KindAdmin, Verb: fmt.Sprint("act ", i)}); err != nil {
			t.Fatal(err)
		}
	}
}

// open prepares a sink of the log.
func open(t *testing.T, cfg Config, l *audit.Log, path string) *Sink {
	t.Helper()
	s, err := New(cfg, Env{
		Program: "sidecar", Path: path, Durable: l.Durable, Append: l.Append,
		Metrics: telemetry.NewRegistry(), Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// start runs a sink until stop is called.
func start(t *testing.T, s *Sink) (stop func()) {
	t.Helper()
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
	cfg := Config{Name: "logs", HTTP: &HTTPConfig{URL: c.URL, TLS: TLS{CA: c.ca}, Token: Secret{File: token}}}
	stop := start(t, open(t, cfg, log, path))
	write(t, log, 10)
	c.await(t, 10)
	c.down.Store(true)
	write(t, log, 3000) // over several files, while nobody takes them
	stop()
	stop = start(t, open(t, cfg, log, path))
	c.down.Store(false)
	got := c.await(t, 3010)
	// A batch under way when the sink was stopped may have come as well, or come yet.
	newest := uint64(0)
	for i, seq := range got {
		if seq > newest+1 {
			t.Fatalf("line %d is record %d, after %d", i+1, seq, newest)
		}
		newest = max(newest, seq)
	}
	c.mu.Lock()
	if c.auth != "Bearer s3cret" {
		t.Errorf("authorization %q", c.auth)
	}
	c.mu.Unlock()
	later := func() []uint64 {
		return slices.DeleteFunc(c.seqs(t), func(seq uint64) bool { return seq <= 3010 })
	}
	last := `"seq":3011,`
	c.forget.Store(&last)
	write(t, log, 1)
	c.until(t, "what was not answered, again,", func() bool { return len(later()) >= 2 })
	stop()
	start(t, open(t, cfg, log, path))
	write(t, log, 1)
	if c.await(t, 3012); !slices.Equal(later(), []uint64{3011, 3011, 3012}) {
		t.Errorf("after an answer that was lost and a restart came %v", later())
	}
}

func TestOCSFIsDelivered(t *testing.T) {
	c := newCollector(t)
	log, path := openLog(t)
	write(t, log, 1)
	start(t, open(t, Config{Name: "o", Format: "ocsf", HTTP: &HTTPConfig{URL: c.URL, TLS: TLS{CA: c.ca}}}, log, path))
	c.until(t, "an event of class 6003", func() bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		return strings.Contains(strings.Join(c.lines, ""), `"class_uid":6003`)
	})
}

// A record that is refused for ever holds nothing up, and is kept.
func TestRefusedIsSetAside(t *testing.T) {
	c := newCollector(t)
	c.poison = "act 137\""
	log, path := openLog(t)
	write(t, log, 1000)
	s := open(t, Config{Name: "logs", HTTP: &HTTPConfig{URL: c.URL, TLS: TLS{CA: c.ca}}}, log, path)
	start(t, s)
	got := c.await(t, 1001) // the last tells of the one that was refused
	want := make([]uint64, 0, len(got))
	for n := range uint64(1001) {
		if n+1 != 138 {
			want = append(want, n+1)
		}
	}
	if !slices.Equal(got, want) {
		t.Errorf("came %v", got)
	}
	b, err := os.ReadFile(path + ".sink-logs.refused")
	if err != nil || strings.Count(string(b), "\n") != 1 || !strings.Contains(string(b), "400 Bad Request") || !strings.Contains(string(b), `"seq":138,`) {
		t.Errorf("set aside: %v %s", err, b)
	}
	c.mu.Lock()
	if l := c.lines[len(c.lines)-1]; !strings.Contains(l, `"reason":"sink_refused"`) || !strings.Contains(l, `"n":1`) {
		t.Error(l)
	}
	c.mu.Unlock()
	if page := scrape(t, s.env.Metrics); !strings.Contains(page, `sallyport_audit_sink_records_total{result="refused",sink="logs"} 1`) {
		t.Error(page)
	}
}

// A peer that refuses everything, what is told of it too, makes no loop.
func TestRefusalsMakeNoLoop(t *testing.T) {
	c := newCollector(t)
	c.poison = "seq"
	log, path := openLog(t)
	write(t, log, 3)
	s := open(t, Config{Name: "logs", HTTP: &HTTPConfig{URL: c.URL, TLS: TLS{CA: c.ca}}}, log, path)
	s.retryMin, s.retryMax = time.Millisecond, time.Millisecond
	for s.Sent() < 4 { // the fourth tells of those before
		if err := s.round(t.Context()); err != nil {
			t.Fatal(err)
		}
		s.tell()
	}
	// The first of three was told at once; the others wait for their minute, and
	// the record that told adds none.
	if s.untold != 2 {
		t.Errorf("%d are untold, want 2", s.untold)
	}
}

// The numbers that are shown while a peer is down.
func TestLagIsShown(t *testing.T) {
	c := newCollector(t)
	c.down.Store(true)
	log, path := openLog(t)
	s := open(t, Config{Name: "logs", HTTP: &HTTPConfig{URL: c.URL, TLS: TLS{CA: c.ca}}}, log, path)
	write(t, log, 5)
	if err := log.Sync(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := s.round(t.Context()); err == nil {
		t.Fatal("delivered to a peer that is down")
	}
	if n, sec := s.lag(); n != 5 || sec <= 0 {
		t.Errorf("%v records, %v seconds", n, sec)
	}
	c.down.Store(false)
	for s.Sent() < 5 {
		if err := s.round(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if page := scrape(t, s.env.Metrics); !strings.Contains(page, `sallyport_audit_sink_lag_records{sink="logs"} 0`) || !strings.Contains(page, `sallyport_audit_sink_lag_seconds{sink="logs"} 0`) {
		t.Error(page)
	}
}

func scrape(t *testing.T, r *telemetry.Registry) string {
	t.Helper()
	w := httptest.NewRecorder()
	r.Handler().ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	return w.Body.String()
}

// A log that was begun anew is sent from its first record, whatever the cursor
// of the one before says.
func TestAnotherLogIsSentFromItsBeginning(t *testing.T) {
	c := newCollector(t)
	log, path := openLog(t)
	cfg := Config{Name: "logs", HTTP: &HTTPConfig{URL: c.URL, TLS: TLS{CA: c.ca}}}
	if err := os.WriteFile(path+".sink-logs", []byte("2\nlog 0123456789abcdef\nbegun 3\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	write(t, log, 4)
	start(t, open(t, cfg, log, path))
	if got := c.await(t, 4); !slices.Equal(got, []uint64{1, 2, 3, 4}) {
		t.Errorf("came %v", got)
	}
}

// What was removed from the log before it was sent is a gap that is told; a new
// sink begins with what there is.
func TestRemovedRecordsAreAGap(t *testing.T) {
	for _, tt := range []struct{ name, cursor, reason string }{{"a cursor", "5\n", "sink_lost"}, {"no cursor", "", ""}} {
		t.Run(tt.name, func(t *testing.T) {
			c := newCollector(t)
			log, path := openLog(t)
			for range 10 { // over several files, since what is written at once is in one
				write(t, log, 100)
				if err := log.Sync(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			names, err := audit.Segments(path)
			if err != nil || len(names) < 3 {
				t.Fatal(names, err)
			}
			if err := os.Remove(names[0]); err != nil {
				t.Fatal(err)
			}
			if tt.cursor != "" {
				if err := os.WriteFile(path+".sink-logs", []byte(tt.cursor), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			start(t, open(t, Config{Name: "logs", HTTP: &HTTPConfig{URL: c.URL, TLS: TLS{CA: c.ca}}}, log, path))
			last := uint64(1000)
			if tt.reason != "" {
				last++
			}
			got := c.await(t, last)
			if got[0] < 2 || len(got) != int(last-got[0]+1) {
				t.Errorf("%d came, from %d", len(got), got[0])
			}
			c.mu.Lock()
			defer c.mu.Unlock()
			if end := c.lines[len(c.lines)-1]; tt.reason != "" && !strings.Contains(end, tt.reason) {
				t.Error(end)
			}
		})
	}
}

func TestMistakes(t *testing.T) {
	secret := filepath.Join(t.TempDir(), "open")
	if err := os.WriteFile(secret, []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		c    Config
		want string
	}{
		{Config{HTTP: &HTTPConfig{URL: "https://a.test"}}, "name"},
		{Config{Name: "A/../b", HTTP: &HTTPConfig{URL: "https://a.test"}}, "name"},
		{Config{Name: "a"}, "write exactly one of file, http, kafka"},
		{Config{Name: "a", HTTP: &HTTPConfig{}}, "http: url: write the address"},
		{Config{Name: "a", HTTP: &HTTPConfig{URL: "http://a.test"}}, "http: url: must be https"},
		{Config{Name: "a", HTTP: &HTTPConfig{URL: "https://u:p@a.test"}}, "password"},
		{Config{Name: "a", HTTP: &HTTPConfig{URL: "https://a.test", Token: Secret{"f", "E"}}}, "http: token: file and env"},
		{Config{Name: "a", HTTP: &HTTPConfig{URL: "https://a.test", TLS: TLS{Cert: "c"}}}, "http: cert: belongs to key"},
		{Config{Name: "a", HTTP: &HTTPConfig{URL: "https://a.test", TLS: TLS{Cert: "c", Key: "k", SVID: true}}}, "http: svid: and cert"},
		{Config{Name: "a", Format: "x", HTTP: &HTTPConfig{URL: "https://a.test"}}, "format"},
		{Config{Name: "a", Batch: BatchConfig{Records: -1}, HTTP: &HTTPConfig{URL: "https://a.test"}}, "batch: records"},
		{Config{Name: "a", Batch: BatchConfig{Bytes: 5}, HTTP: &HTTPConfig{URL: "https://a.test"}}, "batch: bytes"},
		{Config{Name: "a", Batch: BatchConfig{Wait: time.Hour}, HTTP: &HTTPConfig{URL: "https://a.test"}}, "batch: wait"},
		{Config{Name: "a", HTTP: &HTTPConfig{URL: "https://a.test"}, File: &FileConfig{Path: "/x"}}, "2 sections say"},
		{Config{Name: "a", File: &FileConfig{Path: "x", MaxBytes: 1, MaxAge: 1, Keep: -1}}, "file: path"},
		{Config{Name: "a", File: &FileConfig{Path: "/x", MaxBytes: 1}}, "file: max_bytes"},
		{Config{Name: "a", File: &FileConfig{Path: "/x", MaxAge: 1}}, "file: max_age"},
		{Config{Name: "a", File: &FileConfig{Path: "/x", Keep: -1}}, "file: keep"},
		{Config{Name: "a", Syslog: &SyslogConfig{Address: "siem"}}, "syslog: address"},
		{Config{Name: "a", OTLP: &OTLPConfig{URL: "http://a.test"}}, "otlp: url: must be https"},
		{Config{Name: "a", OTLP: &OTLPConfig{Protocol: "grpc", URL: "http://a.test:4317"}}, "otlp: url: must be https"},
		{Config{Name: "a", OTLP: &OTLPConfig{Protocol: "grpc", URL: "https://a.test:4317/v1/logs"}}, "otlp: url: gRPC has no path"},
		{Config{Name: "a", OTLP: &OTLPConfig{Protocol: "thrift", URL: "https://a.test"}}, `otlp: protocol: "thrift" is neither http nor grpc`},
		{Config{Name: "a", Kafka: &KafkaConfig{Topic: "t"}}, "kafka: brokers: missing"},
		{Config{Name: "a", Kafka: &KafkaConfig{Brokers: []string{"a.test:9092"}, Topic: "t", Plaintext: true}}, "kafka: plaintext"},
		{Config{Name: "a", Kafka: &KafkaConfig{Brokers: []string{"a.test:9092"}}}, "kafka: topic"},
		{Config{Name: "a", Kafka: &KafkaConfig{Brokers: []string{"a.test:9092"}, Topic: "t", SASL: SASLConfig{User: "u"}}}, "kafka: sasl: mechanism"},
		{Config{Name: "a", Kafka: &KafkaConfig{Brokers: []string{"a.test:9092"}, Topic: "t", SASL: SASLConfig{Mechanism: "plain", User: "u"}}}, "kafka: sasl: password"},
		{Config{Name: "a", S3: &S3Config{Endpoint: "http://a.test"}}, "s3: endpoint: must be https"},
		{Config{Name: "a", S3: &S3Config{Endpoint: "https://a.test/b"}}, "s3: endpoint: has a path"},
		{Config{Name: "a", S3: &S3Config{Endpoint: "https://a.test", Bucket: "A"}}, "s3: bucket"},
		{Config{Name: "a", S3: &S3Config{Endpoint: "https://a.test", Bucket: "abc", Prefix: "../x"}}, "s3: prefix"},
		{Config{Name: "a", S3: &S3Config{Endpoint: "https://a.test", Bucket: "abc"}}, "s3: secret_key: missing"},
	} {
		if err := tt.c.Validate(); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%+v: %v, want %s", tt.c, err, tt.want)
		}
	}
	good := Config{Name: "a", HTTP: &HTTPConfig{URL: "http://127.0.0.1:9"}}
	if err := (ListConfig{Sinks: []Config{good, good}}).Validate(); err == nil || !strings.Contains(err.Error(), "audit.sinks[1]: name") {
		t.Error(err)
	}
	for _, tt := range []struct {
		c    HTTPConfig
		want string
	}{
		{HTTPConfig{Token: Secret{File: secret}}, "may be read by others (mode 0644); chmod 0600"},
		{HTTPConfig{Token: Secret{Env: "SP_NO_SUCH"}}, "environment variable SP_NO_SUCH is empty"},
		{HTTPConfig{TLS: TLS{CA: secret}}, "holds no certificate"},
		{HTTPConfig{TLS: TLS{SVID: true}}, "has no SVID"},
		{HTTPConfig{TLS: TLS{Cert: secret, Key: secret}}, "may be read by others"},
	} {
		tt.c.URL = "http://127.0.0.1:9"
		_, err := New(Config{Name: "a", HTTP: &tt.c}, Env{Path: filepath.Join(t.TempDir(), "audit.jsonl"), Log: slog.New(slog.DiscardHandler)})
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%+v: %v, want %s", tt.c, err, tt.want)
		}
	}
}
