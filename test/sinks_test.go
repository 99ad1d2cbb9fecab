package test

import (
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/johannesboyne/gofakes3"
	"github.com/johannesboyne/gofakes3/backend/s3mem"
	"github.com/twmb/franz-go/pkg/kfake"
	"github.com/twmb/franz-go/pkg/kgo"
	export "go.opentelemetry.io/proto/slim/otlp/collector/logs/v1"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"sallyport/internal/audit"
	"sallyport/internal/meshtest"
)

// A sinkPeer is a system that takes audit records. Between stop and start it is
// down.
type sinkPeer interface {
	start()
	stop()
	// lines is all that it was given, in the order in which it came.
	lines() []string
	// config is its section.
	config() string
}

// seqOf is the number of a record in a native line, 0 when it is none.
func seqOf(line string) uint64 {
	var r struct {
		Seq uint64 `json:"seq"`
	}
	if json.Unmarshal([]byte(line), &r) != nil {
		return 0
	}
	return r.Seq
}

// A webPeer takes records by HTTP, in the form that take knows.
type webPeer struct {
	t             *testing.T
	addr, section string
	take          func(body []byte) (lines []string, answer []byte, err error)

	srv *http.Server
	mu  sync.Mutex // guards got
	got []string
}

func (p *webPeer) start() {
	p.t.Helper()
	ln, err := net.Listen("tcp", p.addr)
	if err != nil {
		p.t.Fatal(err)
	}
	p.srv = &http.Server{Handler: p}
	go p.srv.Serve(ln) //nolint:errcheck // ends with stop
}

func (p *webPeer) stop() { p.srv.Close() }

func (p *webPeer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	b, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	lines, answer, err := p.take(b)
	if err != nil {
		p.t.Error(err)
		return
	}
	p.got = append(p.got, lines...)
	w.Header().Set("Content-Type", "application/x-protobuf")
	_, _ = w.Write(answer)
}

func (p *webPeer) lines() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.got)
}

func (p *webPeer) config() string { return fmt.Sprintf(p.section, p.addr) }

func takeNDJSON(b []byte) ([]string, []byte, error) {
	return slices.Collect(strings.Lines(string(b))), nil, nil
}

func takeOTLP(b []byte) (lines []string, answer []byte, err error) {
	var q export.ExportLogsServiceRequest
	if err := proto.Unmarshal(b, &q); err != nil {
		return nil, nil, err
	}
	answer, err = proto.Marshal(&export.ExportLogsServiceResponse{})
	return bodies(&q), answer, err
}

// A grpcPeer is a collector that takes OTLP over gRPC.
type grpcPeer struct {
	webPeer
	srv *grpc.Server
}

func (p *grpcPeer) start() {
	p.t.Helper()
	ln, err := net.Listen("tcp", p.addr)
	if err != nil {
		p.t.Fatal(err)
	}
	p.srv = grpc.NewServer()
	p.srv.RegisterService(&grpc.ServiceDesc{
		ServiceName: "opentelemetry.proto.collector.logs.v1.LogsService", HandlerType: (*any)(nil),
		Methods: []grpc.MethodDesc{{MethodName: "Export", Handler: p.export}},
	}, p)
	go p.srv.Serve(ln) //nolint:errcheck // ends with stop
}

func (p *grpcPeer) stop() { p.srv.Stop() }

func (p *grpcPeer) export(_ any, _ context.Context, decode func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
	var q export.ExportLogsServiceRequest
	if err := decode(&q); err != nil {
		return nil, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.got = append(p.got, bodies(&q)...)
	return &export.ExportLogsServiceResponse{}, nil
}

// bodies are the records in a request.
func bodies(q *export.ExportLogsServiceRequest) (lines []string) {
	for _, r := range q.ResourceLogs[0].ScopeLogs[0].LogRecords {
		lines = append(lines, r.Body.GetStringValue())
	}
	return lines
}

// An s3Peer keeps its objects while it is down.
type s3Peer struct {
	webPeer
	mem *s3mem.Backend
	key string // the file of the credentials
}

func newS3Peer(t *testing.T, key string) *s3Peer {
	p := &s3Peer{key: key, mem: s3mem.New(), webPeer: webPeer{t: t, addr: freePort(t)}}
	if err := p.mem.CreateBucket("audit"); err != nil {
		t.Fatal(err)
	}
	return p
}

func (p *s3Peer) start() {
	p.t.Helper()
	ln, err := net.Listen("tcp", p.addr)
	if err != nil {
		p.t.Fatal(err)
	}
	p.srv = &http.Server{Handler: gofakes3.New(p.mem).Server()}
	go p.srv.Serve(ln) //nolint:errcheck // ends with stop
}

func (p *s3Peer) config() string {
	return fmt.Sprintf("batch: {wait: 1s}, s3: {endpoint: \"http://%[1]s\", bucket: audit, access_key: {file: %[2]s}, secret_key: {file: %[2]s}}", p.addr, p.key)
}

func (p *s3Peer) lines() (out []string) {
	list, err := p.mem.ListBucket("audit", &gofakes3.Prefix{}, gofakes3.ListBucketPage{MaxKeys: 100_000})
	if err != nil {
		p.t.Fatal(err)
	}
	for _, c := range list.Contents {
		o, err := p.mem.GetObject("audit", c.Key, nil)
		if err != nil {
			p.t.Fatal(err)
		}
		z, err := gzip.NewReader(o.Contents)
		if err != nil {
			p.t.Fatal(err)
		}
		b, err := io.ReadAll(z)
		if err != nil {
			p.t.Fatal(err)
		}
		out = slices.AppendSeq(out, strings.Lines(string(b)))
	}
	return out
}

// A kafkaPeer is a cluster of one broker on a disk.
type kafkaPeer struct {
	t    *testing.T
	addr string
	dir  string
	c    *kfake.Cluster
}

func (p *kafkaPeer) start() {
	p.t.Helper()
	_, port, err := net.SplitHostPort(p.addr)
	if err != nil {
		p.t.Fatal(err)
	}
	n, err := strconv.Atoi(port)
	if err != nil {
		p.t.Fatal(err)
	}
	if p.c, err = kfake.NewCluster(kfake.NumBrokers(1), kfake.Ports(n), kfake.DataDir(p.dir), kfake.SeedTopics(3, "audit")); err != nil {
		p.t.Fatal(err)
	}
}

func (p *kafkaPeer) stop() { p.c.Close() }

func (p *kafkaPeer) config() string {
	return fmt.Sprintf("kafka: {brokers: [%q], topic: audit, plaintext: true}", p.addr)
}

func (p *kafkaPeer) lines() (out []string) {
	c, err := kgo.NewClient(kgo.SeedBrokers(p.addr), kgo.ConsumeTopics("audit"))
	if err != nil {
		p.t.Fatal(err)
	}
	defer c.Close()
	// All is read when nothing comes for a while.
	for {
		ctx, cancel := context.WithTimeout(p.t.Context(), 3*time.Second)
		fs := c.PollFetches(ctx)
		cancel()
		if fs.NumRecords() == 0 {
			return out
		}
		fs.EachRecord(func(r *kgo.Record) { out = append(out, string(r.Value)) })
	}
}

// A syslogPeer is rsyslog.
type syslogPeer struct{ *meshtest.Rsyslog }

func (p syslogPeer) start() { p.Start() }
func (p syslogPeer) stop()  { p.Stop() }

func (p syslogPeer) config() string {
	return fmt.Sprintf("batch: {wait: 200ms}, syslog: {address: %q, ca: %s/cert.pem, cert: %[2]s/cert.pem, key: %[2]s/key.pem}", p.Addr, p.Dir)
}

func (p syslogPeer) lines() (out []string) {
	b, err := os.ReadFile(p.Out)
	if err != nil {
		return nil
	}
	for line := range strings.Lines(string(b)) {
		if _, msg, ok := strings.Cut(line, "\t"); ok && strings.HasSuffix(line, "\n") {
			out = append(out, strings.TrimSpace(msg))
		}
	}
	return out
}

// A filePeer is down when its directory is away.
type filePeer struct {
	t   *testing.T
	dir string
}

func (p filePeer) start() { p.move(p.dir+".away", p.dir) }
func (p filePeer) stop()  { p.move(p.dir, p.dir+".away") }

func (p filePeer) move(from, to string) {
	p.t.Helper()
	if err := os.Rename(from, to); err != nil {
		p.t.Fatal(err)
	}
}

func (p filePeer) config() string {
	return fmt.Sprintf("file: {path: %s/copy.jsonl, max_bytes: 262144}", p.dir)
}

func (p filePeer) lines() (out []string) {
	names, err := filepath.Glob(p.dir + "/copy.jsonl*")
	if err != nil {
		p.t.Fatal(err)
	}
	// The one being written sorts first and is the newest.
	for _, n := range append(names[min(1, len(names)):], names[:min(1, len(names))]...) {
		b, err := os.ReadFile(n)
		if err != nil {
			p.t.Fatal(err)
		}
		out = slices.AppendSeq(out, strings.Lines(string(b)))
	}
	return out
}

// tally checks what a peer was given against records 1 to last: none missing,
// in order but for what comes again.
func tally(t *testing.T, name string, lines []string, last uint64) (got, again int) {
	t.Helper()
	newest := uint64(0)
	for _, l := range lines {
		switch seq := seqOf(l); {
		case seq == 0:
			t.Errorf("%s got a line that is no record: %.200q", name, l)
		case seq <= newest:
			again++
		case seq == newest+1:
			newest = seq
		default:
			t.Errorf("%s got record %d after %d", name, seq, newest)
			newest = seq
		}
		got++
	}
	if newest < last {
		t.Errorf("%s got records to %d of %d", name, newest, last)
	}
	return got, again
}

func percentile(d []time.Duration, p int) time.Duration {
	if len(d) == 0 {
		return 0
	}
	slices.Sort(d)
	return d[(len(d)-1)*p/100]
}

// outageFor is how long the sinks are down, 10 s unless SALLYPORT_OUTAGE says
// otherwise. It is taken out of the environment, of which the programs take
// every such variable for a setting.
var outageFor = func() string {
	defer os.Unsetenv("SALLYPORT_OUTAGE")
	return cmp.Or(os.Getenv("SALLYPORT_OUTAGE"), "10s")
}()

// TestSinkOutage takes every kind of sink of a sidecar away under load, kills
// the sidecar meanwhile, gives the sinks back, and counts.
func TestSinkOutage(t *testing.T) {
	t.Parallel()
	down, err := time.ParseDuration(outageFor)
	if err != nil {
		t.Fatal(err)
	}
	w := newWorld(t, time.Minute)
	w.put(w.path("s3key"), "key")
	w.startIssuer()
	file := filepath.Join(w.policy, "services.yaml")
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	bill := []byte("  - name: billing\n")
	w.put(file, string(bytes.Replace(b, bill, append(bill, "    audit: full\n"...), 1)))

	away := filePeer{t, w.path("copies")}
	if err := os.Mkdir(away.dir+".away", 0o700); err != nil {
		t.Fatal(err)
	}
	peers := map[string]sinkPeer{
		"file":   away,
		"grpc":   &grpcPeer{webPeer: webPeer{t: t, addr: freePort(t), section: "otlp: {protocol: grpc, url: \"http://%s\"}"}},
		"http":   &webPeer{t: t, addr: freePort(t), section: "http: {url: \"http://%s/in\"}", take: takeNDJSON},
		"kafka":  &kafkaPeer{t: t, addr: freePort(t), dir: w.path("kafka")},
		"otlp":   &webPeer{t: t, addr: freePort(t), section: "otlp: {url: \"http://%s/v1/logs\"}", take: takeOTLP},
		"s3":     newS3Peer(t, w.path("s3key")),
		"syslog": syslogPeer{meshtest.NewRsyslog(t)},
	}
	each := func(do func(name string, p sinkPeer)) {
		for _, name := range []string{"file", "grpc", "http", "kafka", "otlp", "s3", "syslog"} {
			do(name, peers[name])
		}
	}
	pay, billing := &node{name: "payment"}, &node{name: "billing"}
	w.join(billing)
	w.join(pay)
	conf := w.sidecarConfig(billing, w.token("billing")) + "audit:\n  sinks:\n"
	each(func(name string, p sinkPeer) {
		p.start()
		conf += fmt.Sprintf("    - {name: %s, %s}\n", name, p.config())
	})
	t.Cleanup(func() { each(func(_ string, p sinkPeer) { p.stop() }) })
	w.write("billing", conf)
	server := w.startNode(billing)
	payment := w.startNode(pay)
	const url = "http://billing.mesh.internal/v1/charges"
	w.await("reach billing", func() bool {
		return ask[loadReply](payment, "/load", loadRequest{URL: url, For: time.Millisecond, Every: time.Millisecond}).OK > 0
	})
	load := func(d time.Duration) (sum loadReply) {
		for end := time.Now().Add(d); time.Now().Before(end); {
			r := ask[loadReply](payment, "/load", loadRequest{URL: url, For: min(within/3, time.Until(end)), Every: max(5*time.Millisecond, down/4000)})
			sum.Made, sum.OK, sum.Took = sum.Made+r.Made, sum.OK+r.OK, append(sum.Took, r.Took...)
		}
		return sum
	}
	before := load(3 * time.Second)
	each(func(_ string, p sinkPeer) { p.stop() })
	first := load(down / 2)
	var second loadReply
	var loaded sync.WaitGroup
	defer loaded.Wait() // also when the test fails
	loaded.Go(func() { second = load(down - down/2) })
	server.kill() // between two calls or within one
	w.startNode(billing)
	loaded.Wait()
	each(func(_ string, p sinkPeer) { p.start() })
	after := load(2 * time.Second)

	log := w.path("billing", "audit.jsonl")
	last, err := audit.LastSeq(log)
	if err != nil {
		t.Fatal(err)
	}
	w.awaitSinks(peers, last)
	recorded := 0
	if err := audit.Each(log, func(_ []byte, r *audit.Record) error {
		if r.Seq <= last && r.Kind == audit.KindDecision && r.Decision == audit.Allow && r.Path == "/v1/charges" {
			recorded++
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	made, ok := 0, 0
	for _, r := range []loadReply{before, first, second, after} {
		made, ok = made+r.Made, ok+r.OK
	}
	t.Logf("down for %s, sidecar killed once: %d calls made, %d answered, %d recorded in full (with those before the load); %d records in all", down, made, ok, recorded, last)
	t.Logf("p50 and p99 of a call: before %s %s, while all sinks are down %s %s, after %s %s",
		percentile(before.Took, 50), percentile(before.Took, 99), percentile(append(first.Took, second.Took...), 50), percentile(append(first.Took, second.Took...), 99),
		percentile(after.Took, 50), percentile(after.Took, 99))
	if recorded < ok {
		t.Errorf("%d calls were answered and %d are recorded", ok, recorded)
	}
	if first.OK != first.Made || before.OK != before.Made {
		t.Errorf("calls failed without a kill: %d of %d before, %d of %d during the outage", before.OK, before.Made, first.OK, first.Made)
	}
	each(func(name string, p sinkPeer) {
		got, again := tally(t, name, p.lines(), last)
		t.Logf("%-6s got %d records, %d of them again", name, got, again)
		if name == "s3" && again > 0 {
			t.Errorf("s3 has %d records twice", again)
		}
	})
}

// awaitSinks waits until every peer of billing has a record.
func (w *world) awaitSinks(peers map[string]sinkPeer, last uint64) {
	w.t.Helper()
	for name := range peers {
		// A sink that was down comes back after its longest wait, and one attempt
		// that began too early.
		w.awaitFor(2*time.Minute, fmt.Sprintf("see sink %s at record %d", name, last), func() bool {
			b, err := os.ReadFile(w.path("billing", "audit.jsonl.sink-"+name))
			if err != nil {
				w.t.Fatal(err)
			}
			text, _, _ := strings.Cut(string(b), "\n")
			n, err := strconv.ParseUint(text, 10, 64)
			return err == nil && n >= last
		})
	}
	w.await("see what syslog has brought to its file", func() bool {
		lines := peers["syslog"].lines()
		return len(lines) > 0 && slices.ContainsFunc(lines, func(l string) bool { return seqOf(l) == last })
	})
}
