// Bench-h2 measures a pair of sidecars beside pairs of nginx, HAProxy and
// net/http: app -> proxy -> mutual TLS 1.3 -> proxy -> app, HTTP/2 with prior
// knowledge at both edges, all on the same cores, in turn. With -grpc each
// request is a unary call of gRPC with a message of 1 KiB each way.
//
// It prints what it compared, a table, and a line of JSON. A ratio is ours over
// the peer's, the median of the ratios of the rounds. In cpu ratios less is
// better, in those without a word (requests per second) more.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"sallyport/bench/rig"
)

func main() {
	if err := play(os.Args[1:]); err != nil {
		fmt.Fprintf(os.Stderr, "bench-h2: %v\n", err)
		os.Exit(1)
	}
}

// play is the bench, or one of the processes that it starts.
func play(args []string) error {
	role := ""
	if len(args) > 0 {
		role = args[0]
	}
	switch {
	case role == "load" && len(args) == 2:
		return serveLoad(args[1])
	case role == "origin" && len(args) == 2:
		return serveOrigin(args[1])
	case role == "reverse" && len(args) == 4:
		return serveReverse(args[1], args[2], args[3])
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	return measure(ctx, os.Stdout)
}

// bound is the longest that the bench may take.
const bound = 30 * time.Minute

type settings struct {
	issuer, sidecar string
	grpc            bool
	rounds          int
	each, warm      time.Duration
	rules           int
	profile         string
	scenes          []scene
}

func measure(ctx context.Context, w io.Writer) error {
	var s settings
	flag.StringVar(&s.issuer, "issuer", "bin/issuer", "the issuer's binary")
	flag.StringVar(&s.sidecar, "sidecar", "bin/sidecar", "the sidecar's binary")
	flag.BoolVar(&s.grpc, "grpc", false, "unary calls of gRPC instead of requests of HTTP/2")
	flag.IntVar(&s.rounds, "rounds", 5, "rounds")
	flag.DurationVar(&s.each, "each", 2*time.Second, "how long a pair is measured in a round")
	flag.DurationVar(&s.warm, "warm", 500*time.Millisecond, "how long it is warmed up before")
	flag.IntVar(&s.rules, "rules", 1000, "rows of the policy")
	flag.StringVar(&s.profile, "profile", "", "write CPU profiles of both sidecars under load to FILE-client and FILE-server, and measure nothing")
	flag.Parse()
	if s.rounds < 1 || s.rules < 1 || s.each <= 0 {
		return errors.New("settings: want at least one round, one rule and some time for each")
	}
	name := "bench-h2"
	if s.scenes = plainScenes; s.grpc {
		name, s.scenes = "bench-grpc", grpcScenes
	}
	ctx, cancel := context.WithTimeout(ctx, bound)
	defer cancel()
	ground, err := rig.NewGround()
	if err != nil {
		return err
	}
	defer ground.Close()
	b := &bench{Ground: ground}
	if s.profile != "" {
		return b.profile(ctx, s)
	}
	pairs, err := b.pairs(ctx, w, s)
	defer func() {
		for _, p := range pairs {
			p.Stop()
		}
	}()
	if err != nil {
		return err
	}
	fmt.Fprintf(w, "settings: %s, %d cores for everything; TLS 1.3, ECDSA P-256; h2c at both edges; %d rounds of %s a pair after %s of warming up; ours with %d rows, metrics, trace headers and audit, bare with one row and no trace header\n",
		runtime.Version(), runtime.NumCPU(), s.rounds, s.each, s.warm, s.rules)
	for _, p := range pairs {
		fmt.Fprintf(w, "  %s: %s\n", p.Name, p.Settings)
	}
	res := &rig.Result{Name: name, Figures: map[string]float64{}}
	if err := b.rounds(ctx, w, s, pairs, res); err != nil {
		return err
	}
	ok, err := res.Print(w)
	if err == nil && !ok {
		err = errors.New("not every request was answered")
	}
	return err
}

// pairs starts all, and of nginx and HAProxy keeps the count of workers that
// does more.
func (b *bench) pairs(ctx context.Context, w io.Writer, s settings) ([]*pair, error) {
	var out []*pair
	for _, bare := range []bool{false, true} {
		p, err := b.ours(ctx, s, bare, false)
		if err != nil {
			return out, err
		}
		out = append(out, p)
		if b.load == nil {
			b.load = p.load
		}
	}
	for _, start := range []func(n int) (*pair, error){
		func(n int) (*pair, error) { return b.haproxy(ctx, n) },
		func(n int) (*pair, error) { return b.nginx(ctx, n) },
	} {
		p, err := best(w, s, start)
		if err != nil {
			return out, err
		}
		out = append(out, p)
	}
	p, err := b.reverse(ctx)
	if err != nil {
		return out, err
	}
	return append(out, p), nil
}

// best starts a pair with one worker and with one for each core, and keeps the
// one that answers more requests.
func best(w io.Writer, s settings, start func(n int) (*pair, error)) (*pair, error) {
	var kept *pair
	most := int64(0)
	for _, n := range []int{1, runtime.NumCPU()} {
		p, err := start(n)
		if err != nil {
			return nil, err
		}
		r, err := p.load.do(s.scenes[0].order(p, s), func() {})
		if err == nil && r.Failed > 0 {
			err = errors.New(r.Fault)
		}
		if err != nil {
			p.Stop()
			return nil, fmt.Errorf("%s: %w", p.Name, err)
		}
		fmt.Fprintf(w, "tried %s: %d requests in %.1f s\n", p.Name, r.Requests, r.Seconds)
		if r.Requests <= most {
			p.Stop()
			continue
		}
		if kept != nil {
			kept.Stop()
		}
		kept, most = p, r.Requests
	}
	return kept, nil
}

// ours is a pair of sidecars with an issuer of its own. The load process is
// the child of one, the origin of the other.
func (b *bench) ours(ctx context.Context, s settings, bare, pprof bool) (*pair, error) {
	p := &pair{Pair: rig.Pair{Name: "ours", Settings: fmt.Sprintf("a pair of sidecars, %d rows", s.rules)}, trace: true}
	rules := s.rules
	if bare {
		p.Name, p.trace, rules, p.Settings = "bare", false, 1, "the same with one row"
	}
	issuer, err := rig.Start(ctx, rig.Config{Program: s.issuer, Files: policy(rules)})
	if err != nil {
		return nil, err
	}
	b.AtEnd(func() { _ = issuer.Close() })
	front, far, err := b.Ports()
	if err != nil {
		return nil, err
	}
	p.Target = front
	origin, err := rig.FreePort()
	if err != nil {
		return nil, err
	}
	if b.origin == "" {
		b.origin = origin // peers use that of our first pair
	}
	socket := filepath.Join(b.Dir, p.Name+".sock")
	more := ""
	if pprof {
		more = "pprof: true\n"
	}
	server, err := issuer.Sidecar(ctx, s.sidecar, "server", more+fmt.Sprintf("inbound: {listen: %q, app: %q, app_protocol: h2c}\n", far, origin), b.Self, "origin", origin)
	if err != nil {
		return nil, err
	}
	p.Procs = append(p.Procs, server)
	b.AtEnd(p.Stop)
	if err := server.Await(ctx, "tcp", origin, far); err != nil {
		return nil, err
	}
	client, err := issuer.Sidecar(ctx, s.sidecar, "client", more+fmt.Sprintf("outbound: {upstreams: [{service: origin, listen: %q}]}\n", front), b.Self, "load", socket)
	if err != nil {
		return nil, err
	}
	p.Procs = append(p.Procs, client)
	if err := errors.Join(client.Await(ctx, "unix", socket), client.Await(ctx, "tcp", front)); err != nil {
		return nil, err
	}
	if p.load, err = dialLoad(socket); err != nil {
		return nil, err
	}
	return p, b.answers(ctx, p, s)
}

// answers waits until the policy has reached both sidecars.
func (b *bench) answers(ctx context.Context, p *pair, s settings) error {
	o := s.scenes[0].order(p, s)
	o.Conns, o.Streams, o.Warm, o.For = 1, 1, 0, 20*time.Millisecond
	for end := time.Now().Add(30 * time.Second); ; {
		r, err := p.load.do(o, func() {})
		if err != nil {
			return err
		}
		if r.Failed == 0 && r.Requests > 0 {
			return nil
		}
		if ctx.Err() != nil || time.Now().After(end) {
			return fmt.Errorf("%s does not answer: %s", p.Name, r.Fault)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func policy(rows int) map[string]string {
	id := func(name string) string { return "spiffe://" + rig.TrustDomain.Name() + "/ns/bench/sa/" + name }
	var access strings.Builder
	for n := range rows - 1 {
		fmt.Fprintf(&access, "p, r%d, in, %s, %s, 8443, GET|POST, /v2/thing-%d/**, -, allow\n", n, id("client"), id("origin"), n)
	}
	fmt.Fprintf(&access, "p, get, in, %s, %s, 8443, GET, /v1/**, -, allow\n", id("client"), id("origin"))
	fmt.Fprintf(&access, "p, call, in, %s, %s, 8443, POST, /bench.Echo/**, -, allow\n", id("client"), id("origin"))
	return map[string]string{
		"entries.yaml": fmt.Sprintf("entries:\n  - {spiffe_id: %q, parent_id: %q, selectors: [\"child:true\"]}\n  - {spiffe_id: %q, parent_id: %q, selectors: [\"child:true\"]}\n",
			id("client"), rig.Agent("client"), id("origin"), rig.Agent("server")),
		"services.yaml": fmt.Sprintf("services:\n  - {name: origin, identity: %q, port: 8443, protocol: http}\n", id("origin")),
		"access.csv":    access.String(), "guardrails.csv": "", "egress.yaml": "destinations: []\n",
	}
}
