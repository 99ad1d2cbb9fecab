package sink

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
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

	"github.com/johannesboyne/gofakes3"
	"github.com/johannesboyne/gofakes3/backend/s3mem"
	"github.com/twmb/franz-go/pkg/kfake"
	"github.com/twmb/franz-go/pkg/kgo"
	export "go.opentelemetry.io/proto/slim/otlp/collector/logs/v1"
	"google.golang.org/protobuf/proto"

	"sallyport/internal/audit"
	"sallyport/internal/meshtest"
)

// upTo are the numbers from 1.
func upTo(n int) (out []uint64) {
	for i := range n {
		out = append(out, uint64(i+1))
	}
	return out
}

// seqsOf reads the numbers of native lines.
func seqsOf(t *testing.T, text string) (out []uint64) {
	t.Helper()
	for line := range strings.Lines(text) {
		var r struct {
			Seq uint64 `json:"seq"`
		}
		if err := json.Unmarshal([]byte(line), &r); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		out = append(out, r.Seq)
	}
	return out
}

// deliver sends what is in the log, up to record last.
func deliver(t *testing.T, s *Sink, last uint64) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	defer s.close()
	for s.Sent() < last {
		if err := s.round(ctx); err != nil {
			t.Fatal(err)
		}
	}
}

func TestFileIsRotatedAndMended(t *testing.T) {
	log, path := openLog(t)
	out := filepath.Join(t.TempDir(), "copy.jsonl")
	// Of a batch that a crash cut off, no half line stays.
	if err := os.WriteFile(out, []byte(`{"seq":0}`+"\n"+`{"seq":1,"half`), 0o644); err != nil {
		t.Fatal(err)
	}
	s := open(t, Config{Name: "copy", Batch: BatchConfig{Records: 7}, File: &FileConfig{Path: out, MaxBytes: 4096, Keep: 100}}, log, path)
	write(t, log, 100)
	deliver(t, s, 100)
	names, err := filepath.Glob(out + ".*")
	if err != nil || len(names) < 3 {
		t.Fatal(names, err)
	}
	slices.Sort(names)
	var all []byte
	for _, n := range append(names, out) {
		st, err := os.Stat(n)
		if err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v %v", n, st.Mode(), err)
		}
		b, err := os.ReadFile(n)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, b...)
	}
	if got := seqsOf(t, string(all)); !slices.Equal(got, append([]uint64{0}, upTo(100)...)) {
		t.Errorf("the files hold %v", got)
	}
	p := s.peer.(*file)
	p.cfg.Keep = 2
	if err := p.prune(); err != nil {
		t.Fatal(err)
	}
	if names, _ = filepath.Glob(out + ".*"); len(names) != 2 {
		t.Errorf("kept %v", names)
	}
	// Two writers would mix their lines.
	if err := p.ready(); err != nil {
		t.Fatal(err)
	}
	defer p.close()
	if err := (&file{cfg: FileConfig{Path: out}, max: 4096, age: time.Hour}).ready(); err == nil || !strings.Contains(err.Error(), "another process or sink") {
		t.Error(err)
	}
}

func TestKafkaTakesRecordsInOrder(t *testing.T) {
	c, err := kfake.NewCluster(kfake.NumBrokers(1), kfake.SeedTopics(3, "audit"), kfake.EnableSASL(), kfake.Superuser("SCRAM-SHA-512", "sp", "pw"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	t.Setenv("SP_TEST_KAFKA", "pw")
	log, path := openLog(t)
	conf := &KafkaConfig{
		Brokers: c.ListenAddrs(), Topic: "audit", Plaintext: true,
		SASL: SASLConfig{Mechanism: "scram-sha-512", User: "sp", Password: Secret{Env: "SP_TEST_KAFKA"}},
	}
	s := open(t, Config{Name: "k", Batch: BatchConfig{Records: 100}, Kafka: conf}, log, path)
	write(t, log, 500)
	deliver(t, s, 500)
	consumer, err := kgo.NewClient(append(slices.Clone(open(t, Config{Name: "r", Kafka: conf}, log, path).peer.(*kafka).opts), kgo.ConsumeTopics("audit"))...)
	if err != nil {
		t.Fatal(err)
	}
	defer consumer.Close()
	var got []uint64
	partitions := map[int32]bool{}
	for len(got) < 500 {
		fs := consumer.PollFetches(t.Context())
		if err := fs.Err(); err != nil {
			t.Fatal(err)
		}
		fs.EachRecord(func(r *kgo.Record) {
			partitions[r.Partition] = true
			got = append(got, seqsOf(t, string(r.Value))...)
		})
	}
	if !slices.Equal(got, upTo(500)) || len(partitions) != 1 {
		t.Errorf("%d partitions, records %v", len(partitions), got)
	}
}

// What waited through an outage is as old as the outage was long.
func TestKafkaTakesWhatIsOld(t *testing.T) {
	c, err := kfake.NewCluster(kfake.NumBrokers(1), kfake.SeedTopics(1, "audit"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	log, path := openLog(t)
	s := open(t, Config{Name: "k", Kafka: &KafkaConfig{Brokers: c.ListenAddrs(), Topic: "audit", Plaintext: true}}, log, path)
	defer s.close()
	old := record{Record: audit.Record{Seq: 1, Time: time.Now().Add(-24 * time.Hour)}, text: []byte("{\"seq\":1}\n")}
	ctx, cancel := context.WithTimeout(t.Context(), deliverTime)
	defer cancel()
	if err := s.peer.deliver(ctx, &batch{log: "l", records: []record{old}}); err != nil {
		t.Error(err)
	}
}

func TestKafkaThatDoesNotAnswerEndsInTime(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	log, path := openLog(t)
	s := open(t, Config{Name: "k", Kafka: &KafkaConfig{Brokers: []string{ln.Addr().String()}, Topic: "audit", Plaintext: true}}, log, path)
	write(t, log, 1)
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if err := s.round(ctx); err == nil || s.Sent() != 0 {
		t.Errorf("%v, %d sent", err, s.Sent())
	}
	s.close()
}

func TestS3ReplacesABatchThatComesAgain(t *testing.T) {
	mem := s3mem.New()
	if err := mem.CreateBucket("audit"); err != nil {
		t.Fatal(err)
	}
	fake := gofakes3.New(mem).Server()
	var forgot atomic.Bool
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPut && !forgot.Swap(true) {
			// The object is kept, and the answer lost.
			fake.ServeHTTP(httptest.NewRecorder(), r)
			w.WriteHeader(http.StatusBadGateway)
			return
		}
		fake.ServeHTTP(w, r)
	}))
	t.Cleanup(srv.Close)
	t.Setenv("SP_TEST_S3", "key")
	log, path := openLog(t)
	cfg := Config{Name: "s", Batch: BatchConfig{Wait: time.Second, Records: 40}, S3: &S3Config{
		Endpoint: srv.URL, Bucket: "audit", Prefix: "a/b", AccessKey: Secret{Env: "SP_TEST_S3"}, SecretKey: Secret{Env: "SP_TEST_S3"},
	}}
	write(t, log, 30)
	s := open(t, cfg, log, path)
	if err := s.round(t.Context()); err == nil {
		t.Fatal("an answer that was lost counts as one")
	}
	s.close()
	write(t, log, 70) // the next process finds more than was begun
	deliver(t, open(t, cfg, log, path), 100)
	list, err := mem.ListBucket("audit", &gofakes3.Prefix{}, gofakes3.ListBucketPage{})
	if err != nil {
		t.Fatal(err)
	}
	var got []uint64
	for _, c := range list.Contents {
		o, err := mem.GetObject("audit", c.Key, nil)
		if err != nil {
			t.Fatal(err)
		}
		z, err := gzip.NewReader(o.Contents)
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(z)
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, seqsOf(t, string(b))...)
	}
	if !slices.Equal(got, upTo(100)) || !strings.Contains(list.Contents[0].Key, "/00000000000000000001-00000000000000000030.jsonl.gz") {
		t.Errorf("%d objects from %s, records %v", len(list.Contents), list.Contents[0].Key, got)
	}
}

func TestOTLPHandlesPartialSuccess(t *testing.T) {
	var mu sync.Mutex
	var got []uint64
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		b, err := io.ReadAll(r.Body)
		var q export.ExportLogsServiceRequest
		if err = errors.Join(err, proto.Unmarshal(b, &q)); err != nil {
			t.Error(err)
		}
		resp := &export.ExportLogsServiceResponse{}
		if got == nil {
			resp.PartialSuccess = &export.ExportLogsPartialSuccess{RejectedLogRecords: 1, ErrorMessage: "too old"}
		}
		for _, l := range q.ResourceLogs[0].ScopeLogs[0].LogRecords {
			got = append(got, seqsOf(t, l.Body.GetStringValue()+"\n")...)
		}
		out, err := proto.Marshal(resp)
		if err != nil {
			t.Error(err)
		}
		w.Header().Set("Content-Type", "application/x-protobuf")
		_, _ = w.Write(out)
	}))
	t.Cleanup(srv.Close)
	log, path := openLog(t)
	s := open(t, Config{Name: "o", OTLP: &OTLPConfig{URL: srv.URL + "/v1/logs"}, Batch: BatchConfig{Records: 10, Wait: time.Minute}}, log, path)
	write(t, log, 50)
	deliver(t, s, 50)
	mu.Lock()
	defer mu.Unlock()
	if !slices.Equal(got, upTo(50)) {
		t.Errorf("came %v", got)
	}
	b, err := os.ReadFile(path + ".sink-o.refused")
	if err != nil || bytes.Count(b, []byte("\n")) != 10 || !bytes.Contains(b, []byte("rejected 1 of 10")) {
		t.Errorf("%v %s", err, b)
	}
}

func TestSyslogIsTakenByRsyslog(t *testing.T) {
	r := meshtest.NewRsyslog(t)
	log, path := openLog(t)
	cfg := Config{Name: "siem", Batch: BatchConfig{Records: 100, Wait: 50 * time.Millisecond}, Syslog: &SyslogConfig{Address: r.Addr, TLS: TLS{
		CA: filepath.Join(r.Dir, "cert.pem"), Cert: filepath.Join(r.Dir, "cert.pem"), Key: filepath.Join(r.Dir, "key.pem"),
	}}}
	write(t, log, 300)
	r.Start()
	s := open(t, cfg, log, path)
	end := start(t, s) // tries until the server listens
	awaitSent(t, s, 300)
	r.Stop() // which brings what it has read to its file
	write(t, log, 300)
	r.Start()
	awaitSent(t, s, 600)
	end()
	r.Stop()
	b, err := os.ReadFile(r.Out)
	if err != nil {
		t.Fatal(err)
	}
	var got []uint64
	for line := range strings.Lines(string(b)) {
		sd, msg, ok := strings.Cut(line, "\t")
		n := seqsOf(t, strings.TrimSpace(msg)+"\n")
		if !ok || !strings.HasPrefix(sd, "[sallyport@32473 log=") || !strings.Contains(sd, fmt.Sprintf(` seq="%d"`, n[0])) {
			t.Fatalf("structured data: %s", sd)
		}
		got = append(got, n...)
	}
	if !slices.Equal(slices.Compact(slices.Clone(got)), upTo(600)) {
		t.Errorf("%d came: %v", len(got), got)
	}
}

// awaitSent waits for the cursor.
func awaitSent(t *testing.T, s *Sink, last uint64) {
	t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for late := time.After(2 * time.Minute); s.Sent() < last; {
		select {
		case <-tick.C:
		case <-late:
			t.Fatalf("%d of %d are sent", s.Sent(), last)
		}
	}
}

// A syslog server that ends without reading has confirmed nothing.
func TestSyslogUnreadIsNotConfirmed(t *testing.T) {
	srv := httptest.NewUnstartedServer(nil)
	srv.StartTLS()
	t.Cleanup(srv.Close)
	ca := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			c.Close()
		}
	}()
	log, path := openLog(t)
	s := open(t, Config{Name: "x", Syslog: &SyslogConfig{Address: ln.Addr().String(), TLS: TLS{CA: ca}}}, log, path)
	write(t, log, 1)
	if err := s.round(t.Context()); err == nil || s.Sent() != 0 {
		t.Errorf("%v, %d sent", err, s.Sent())
	}
}
