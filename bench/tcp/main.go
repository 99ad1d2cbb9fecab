// Bench-tcp measures how a pair of sidecars carries streams beside pairs of
// nginx, HAProxy and stunnel: app -> proxy -> mutual TLS 1.3 -> proxy -> app,
// all on the same cores, in turn: bytes without end in one direction, on one
// connection and on several, and single bytes with their echo.
//
// It prints what it compared, a table, and a line of JSON. A ratio is ours over
// the peer's, the median of the ratios of the rounds; those of throughput are
// better the larger, those of CPU the smaller. The figure without a scene is
// the smallest of the four scenes'.
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
	"text/tabwriter"
	"time"

	"sallyport/bench/rig"
)

func main() {
	rig.Main("bench-tcp", measure, map[string]rig.Role{"load": rig.Load(order.run), "origin": rig.At(serveOrigin)})
}

// bound is the longest that the bench may take.
const bound = 30 * time.Minute

type settings struct {
	issuer, sidecar string
	rounds          int
	each, warm      time.Duration
	rules           int
	// scenes are those to measure, peers which pairs beside ours.
	scenes, peers []string
	profile       string
}

func measure(ctx context.Context, w io.Writer) error {
	var s settings
	flag.StringVar(&s.issuer, "issuer", "bin/issuer", "the issuer's binary")
	flag.StringVar(&s.sidecar, "sidecar", "bin/sidecar", "the sidecar's binary")
	flag.IntVar(&s.rounds, "rounds", 5, "rounds")
	flag.DurationVar(&s.each, "each", 2*time.Second, "how long a pair is measured in a round")
	flag.DurationVar(&s.warm, "warm", 500*time.Millisecond, "how long it is warmed up before")
	flag.IntVar(&s.rules, "rules", 1000, "rows of the policy")
	wanted := flag.String("scenes", "", "the scenes to measure, with commas between (default all)")
	pairs := flag.String("pairs", "nginx,haproxy,stunnel", "the pairs to measure beside ours, with commas between")
	flag.StringVar(&s.profile, "profile", "", "write CPU profiles of both sidecars under the first scene to FILE-client and FILE-server, and measure nothing")
	flag.Parse()
	s.scenes, s.peers = strings.Split(*wanted, ","), strings.Split(*pairs, ",")
	if s.rounds < 1 || s.rules < 1 || s.each <= 0 || len(s.wanted()) == 0 {
		return errors.New("settings: want at least one round, one rule, one scene and some time for each")
	}
	ctx, cancel := context.WithTimeout(ctx, bound)
	defer cancel()
	ground, err := rig.NewGround()
	if err != nil {
		return err
	}
	defer ground.Close()
	b := &bench{Ground: ground, got: map[cell][]sample{}}
	if err := b.start(ctx, w, s); err != nil {
		return err
	}
	if s.profile != "" {
		return b.profile(ctx, s)
	}
	fmt.Fprintf(w, "settings: %s, %d cores for everything; TLS 1.3, ECDSA P-256; %d rounds of %s a pair after %s of warming up; ours with %d rows, metrics and audit; what arrives is dropped in the kernel\n",
		runtime.Version(), runtime.NumCPU(), s.rounds, s.each, s.warm, s.rules)
	for _, p := range b.pairs {
		fmt.Fprintf(w, "  %s: %s\n", p.Name, p.Settings)
	}
	res := &rig.Result{Name: "bench-tcp", Figures: map[string]float64{}}
	if err := b.rounds(ctx, w, s, res); err != nil {
		return err
	}
	return res.End(w, "not every connection was carried")
}

// A scene is a load that every pair is put under.
type scene struct {
	name      string
	up, pings bool
	conns     int
}

var scenes = []scene{
	{"down-1", false, false, 1}, {"up-1", true, false, 1},
	{"down-8", false, false, 8}, {"up-8", true, false, 8},
	{"echo-1", false, true, 1}, {"echo-8", false, true, 8},
}

// wanted are the scenes that are asked for.
func (s settings) wanted() (out []scene) {
	for _, sc := range scenes {
		if s.scenes[0] == "" || slices.Contains(s.scenes, sc.name) {
			out = append(out, sc)
		}
	}
	return out
}

// A cell is a scene with a pair.
type cell struct{ scene, pair string }

// A sample is what a pair did in one round.
type sample struct {
	report
	busy time.Duration // of both proxies
	rss  float64       // of both, MB
}

// mbps is MB of 10^6 bytes in a second; of echoes, thousands of them.
func (s sample) mbps() float64 {
	if s.Pings > 0 {
		return float64(s.Pings) / 1e3 / s.Seconds
	}
	return float64(s.Bytes) / 1e6 / s.Seconds
}

// cpu is the seconds that both proxies computed for 10^9 bytes; of echoes, for
// 100,000.
func (s sample) cpu() float64 {
	if s.Pings > 0 {
		return s.busy.Seconds() / float64(s.Pings) * 1e5
	}
	return s.busy.Seconds() / float64(s.Bytes) * 1e9
}

type bench struct {
	*rig.Ground
	origin string
	load   *rig.Loader[order, report]
	pairs  []*rig.Pair
	got    map[cell][]sample
}

// start starts all pairs, and of each peer keeps the way that carries most.
func (b *bench) start(ctx context.Context, w io.Writer, s settings) error {
	conf := rig.Sidecars{
		Name: "ours", Issuer: s.issuer, Sidecar: s.sidecar, Protocol: "tcp", Rules: s.rules,
		Load: []string{b.Self, "load"}, Origin: []string{b.Self, "origin"},
	}
	if s.profile != "" {
		conf.More = "pprof: true\n"
	}
	ours, socket, origin, err := b.Sidecars(ctx, conf)
	if err != nil {
		return err
	}
	ours.Settings = fmt.Sprintf("a pair of sidecars, %d rows", s.rules)
	b.origin, b.pairs = origin, append(b.pairs, ours)
	if b.load, err = rig.DialLoader[order, report](socket); err != nil {
		return err
	}
	if err := b.answers(ctx, ours); err != nil || s.profile != "" {
		return err
	}
	cores := runtime.NumCPU()
	for _, peer := range []struct {
		name  string
		start func(context.Context, rig.Streams) (*rig.Pair, error)
		ways  []rig.Streams
	}{
		{"nginx", b.NginxStream, []rig.Streams{{Workers: 1, Buffer: 16}, {Workers: cores, Buffer: 16}, {Workers: cores, Buffer: 64}, {Workers: cores, Buffer: 256}}},
		{"haproxy", b.HAProxyStream, []rig.Streams{{Workers: 1, Buffer: 16}, {Workers: cores, Buffer: 16}, {Workers: cores, Buffer: 64}}},
		{"stunnel", b.Stunnel, []rig.Streams{{}}},
	} {
		if !slices.Contains(s.peers, peer.name) {
			continue
		}
		p, err := b.best(ctx, w, s, peer.start, peer.ways)
		if err != nil {
			return err
		}
		b.pairs = append(b.pairs, p)
		b.AtEnd(p.Stop)
	}
	return nil
}

// best starts a pair in each way and keeps the one that carries most on several
// connections.
func (b *bench) best(ctx context.Context, w io.Writer, s settings, start func(context.Context, rig.Streams) (*rig.Pair, error), ways []rig.Streams) (*rig.Pair, error) {
	var kept *rig.Pair
	most := 0.0
	for _, way := range ways {
		way.Origin, way.Group = b.origin, "X25519"
		p, err := start(ctx, way)
		if err != nil {
			return nil, err
		}
		sum := 0.0
		for _, sc := range scenes[:4] {
			one, err := b.again(w, p, sc, s)
			if err != nil {
				fmt.Fprintf(w, "left out: %v\n", err)
				sum = 0
				break
			}
			sum += one.mbps() / 4
		}
		if len(ways) > 1 {
			fmt.Fprintf(w, "tried %s: %.0f MB/s\n", p.Name, sum)
		}
		if sum <= most {
			p.Stop()
			continue
		}
		if kept != nil {
			kept.Stop()
		}
		kept, most = p, sum
	}
	if kept == nil {
		return nil, errors.New("a peer carried nothing")
	}
	return kept, nil
}

// stumbles is how often in a row a peer may break a connection off.
const stumbles = 3

// again measures a peer anew when it breaks a connection off, as nginx does at
// times while a worker of it is on its way.
func (b *bench) again(w io.Writer, p *rig.Pair, sc scene, s settings) (one sample, err error) {
	for range stumbles {
		if one, err = b.measure(p, sc, s); err == nil {
			return one, nil
		}
		fmt.Fprintf(w, "again: %v\n", err)
	}
	return one, err
}

// answers waits until the policy has reached both sidecars.
func (b *bench) answers(ctx context.Context, p *rig.Pair) error {
	o := order{Target: p.Target, Origin: b.origin, Pings: true, Conns: 1, For: 20 * time.Millisecond}
	for end := time.Now().Add(30 * time.Second); ; {
		r, err := b.load.Do(o, func() {})
		switch {
		case err != nil:
			return err
		case r.Pings > 0:
			return nil
		case ctx.Err() != nil || time.Now().After(end):
			return fmt.Errorf("%s does not answer: %s", p.Name, r.Fault)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func (b *bench) measure(p *rig.Pair, sc scene, s settings) (sample, error) {
	pids := p.PIDs()
	var before, after time.Duration
	var failed error
	rep, err := b.load.Do(order{Target: p.Target, Origin: b.origin, Up: sc.up, Pings: sc.pings, Conns: sc.conns, Warm: s.warm, For: s.each},
		func() { before, failed = rig.CPUOf(pids...) })
	if err == nil && rep.Fault != "" {
		err = errors.New(rep.Fault)
	}
	if err = errors.Join(err, failed); err != nil {
		return sample{}, fmt.Errorf("%s, %s: %w", p.Name, sc.name, err)
	}
	if after, err = rig.CPUOf(pids...); err != nil {
		return sample{}, err
	}
	rss, err := rig.RSSOf(pids...)
	return sample{report: rep, busy: after - before, rss: rss}, err
}

// rounds measures every pair under every scene, in turn.
func (b *bench) rounds(ctx context.Context, w io.Writer, s settings, res *rig.Result) error {
	turn := slices.Clone(b.pairs)
	for range s.rounds {
		for _, sc := range s.wanted() {
			for _, p := range turn {
				if ctx.Err() != nil {
					return context.Cause(ctx)
				}
				if p != b.pairs[0] {
					// What a peer does not carry is no fault of ours, and its row stays short.
					if one, err := b.again(w, p, sc, s); err == nil {
						b.got[cell{sc.name, p.Name}] = append(b.got[cell{sc.name, p.Name}], one)
					}
					continue
				}
				one, err := b.measure(p, sc, s)
				res.Cases.Tried += int64(sc.conns)
				if err != nil {
					res.Cases.Failed += int64(sc.conns)
					return err
				}
				res.Cases.Passed += int64(sc.conns)
				b.got[cell{sc.name, p.Name}] = append(b.got[cell{sc.name, p.Name}], one)
			}
			slices.Reverse(turn) // nobody is always first
		}
	}
	b.table(w, s.wanted())
	b.figures(res.Figures, s.wanted())
	return nil
}

func (b *bench) table(w io.Writer, wanted []scene) {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "scene\tpair\tMB/s (echo: 1,000/s)\tCPU s/GB (echo: s/100k)\tRSS MB\t")
	for _, sc := range wanted {
		for _, p := range b.pairs {
			m := func(f func(sample) float64) float64 {
				var v []float64
				for _, one := range b.got[cell{sc.name, p.Name}] {
					v = append(v, f(one))
				}
				return rig.Quantile(v, 0.5)
			}
			fmt.Fprintf(t, "%s\t%s\t%.1f\t%.2f\t%.0f\t\n", sc.name, p.Name, m(sample.mbps), m(sample.cpu), m(func(s sample) float64 { return s.rss }))
		}
	}
	_ = t.Flush()
}

func (b *bench) figures(out map[string]float64, wanted []scene) {
	for _, p := range b.pairs[1:] {
		name, _, _ := strings.Cut(p.Name, "-")
		for _, sc := range wanted {
			out[name+"_ratio_"+sc.name] = b.ratio(sc, p, sample.mbps)
			out[name+"_cpu_ratio_"+sc.name] = b.ratio(sc, p, sample.cpu)
			if least, ok := out[name+"_ratio"]; !sc.pings && (!ok || out[name+"_ratio_"+sc.name] < least) {
				out[name+"_ratio"] = out[name+"_ratio_"+sc.name]
			}
		}
	}
}

// ratio is the median over the rounds.
func (b *bench) ratio(sc scene, p *rig.Pair, f func(sample) float64) float64 {
	ours, theirs := b.got[cell{sc.name, b.pairs[0].Name}], b.got[cell{sc.name, p.Name}]
	var v []float64
	for i := range min(len(ours), len(theirs)) {
		v = append(v, f(ours[i])/f(theirs[i]))
	}
	return rig.Quantile(v, 0.5)
}

// profile writes what both sidecars do under the first scene.
func (b *bench) profile(ctx context.Context, s settings) error {
	done := make(chan error, 2)
	sc, p := s.wanted()[0], b.pairs[0]
	r, err := b.load.Do(order{Target: p.Target, Origin: b.origin, Up: sc.up, Conns: sc.conns, Warm: s.warm, For: 12 * time.Second}, func() {
		for i, half := range []string{"server", "client"} {
			go func() { done <- p.Procs[i].Profile(ctx, s.profile+"-"+half, 10*time.Second) }()
		}
	})
	if err == nil {
		fmt.Printf("%.0f MB/s\n", sample{report: r}.mbps())
	}
	return errors.Join(err, <-done, <-done)
}
