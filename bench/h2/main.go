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
	"runtime"
	"slices"
	"strings"
	"time"

	"sallyport/bench/rig"
)

func main() {
	rig.Main("bench-h2", measure, map[string]rig.Role{"load": rig.Load(order.run), "origin": rig.At(serveOrigin), "reverse": rig.Reverse(speaksHTTP2)})
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
	beside          string // another sidecar
	scenes          []scene
	wanted          []string // pairs
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
	flag.StringVar(&s.beside, "beside", "", "another binary of the sidecar, measured as a peer")
	wanted := flag.String("scenes", "", "the scenes to measure, with commas between (default all)")
	pairs := flag.String("pairs", "", "the pairs to measure, with commas between (default all)")
	flag.Parse()
	name := "bench-h2"
	if s.scenes = plainScenes; s.grpc {
		name, s.scenes = "bench-grpc", grpcScenes
	}
	if s.wanted = names; *pairs != "" {
		s.wanted = strings.Split(*pairs, ",")
	}
	if *wanted != "" {
		s.scenes = slices.DeleteFunc(slices.Clone(s.scenes), func(sc scene) bool { return !slices.Contains(strings.Split(*wanted, ","), sc.name) })
	}
	if s.rounds < 1 || s.rules < 1 || s.each <= 0 || len(s.scenes) == 0 {
		return errors.New("settings: want at least one round, one rule, one scene and some time for each")
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
	all, err := b.pairs(ctx, w, s)
	defer func() {
		for _, p := range all {
			p.Stop()
		}
	}()
	if err != nil {
		return err
	}
	fmt.Fprintf(w, "settings: %s, %d cores for everything; TLS 1.3, ECDSA P-256; h2c at both edges; %d rounds of %s a pair after %s of warming up; ours with %d rows, metrics, trace headers and audit, bare with one row and no trace header\n",
		runtime.Version(), runtime.NumCPU(), s.rounds, s.each, s.warm, s.rules)
	for _, p := range all {
		fmt.Fprintf(w, "  %s: %s\n", p.Name, p.Settings)
	}
	res := &rig.Result{Name: name, Figures: map[string]float64{}}
	if err := b.rounds(ctx, w, s, all, res); err != nil {
		return err
	}
	return res.End(w, "not every request was answered")
}

// pairs starts all, and of nginx and HAProxy keeps the count of workers that
// does more.
func (b *bench) pairs(ctx context.Context, w io.Writer, s settings) ([]*pair, error) {
	var out []*pair
	for _, name := range []string{"ours", "bare", "beside"} {
		if name != "ours" && !slices.Contains(s.wanted, name) || name == "beside" && s.beside == "" {
			continue
		}
		p, err := b.ours(ctx, s, name, false)
		if err != nil {
			return out, err
		}
		out = append(out, p)
		if b.load == nil {
			b.load = p.Load
		}
	}
	for _, peer := range []struct {
		name  string
		start func(context.Context, int) (*pair, error)
	}{{"haproxy", b.haproxy}, {"nginx", b.nginx}} {
		if !slices.Contains(s.wanted, peer.name) {
			continue
		}
		p, err := rig.Best(w, func(n int) (*pair, error) { return peer.start(ctx, n) }, func(p *pair) order { return s.scenes[0].order(p, s) })
		if err != nil {
			return out, err
		}
		out = append(out, p)
	}
	if !slices.Contains(s.wanted, "nethttp") {
		return out, nil
	}
	p, err := b.reverse(ctx)
	if err != nil {
		return out, err
	}
	return append(out, p), nil
}

// ours is a pair of sidecars. Peers use the origin of the first.
func (b *bench) ours(ctx context.Context, s settings, name string, pprof bool) (*pair, error) {
	conf := rig.Sidecars{
		Name: name, Issuer: s.issuer, Sidecar: s.sidecar, Protocol: "http", AppProtocol: "h2c", Method: method, Rules: s.rules,
		Load: []string{b.Self, "load"}, Origin: []string{b.Self, "origin"},
	}
	how := fmt.Sprintf("a pair of sidecars, %d rows", s.rules)
	switch name {
	case "bare":
		conf.Rules, how = 1, "the same with one row"
	case "beside":
		conf.Sidecar, how = s.beside, "the same as ours, of "+s.beside
	}
	if pprof {
		conf.More = "pprof: true\n"
	}
	both, socket, origin, err := b.Sidecars(ctx, conf)
	if err != nil {
		return nil, err
	}
	if b.origin == "" {
		b.origin = origin
	}
	both.Settings = how
	p := &pair{Pair: *both, Trace: name != "bare"}
	if p.Load, err = rig.DialLoader[order, rig.Calls](socket); err != nil {
		return nil, err
	}
	o := s.scenes[0].order(p, s)
	o.Conns, o.Streams, o.Warm, o.For = 1, 1, 0, 20*time.Millisecond
	return p, p.Await(ctx, o)
}
