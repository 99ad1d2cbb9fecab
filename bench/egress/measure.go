package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"text/tabwriter"
	"time"

	"sallyport/bench/rig"
)

// A cell is a scene with a proxy.
type cell struct{ scene, proxy string }

// A sample is what a proxy did in one round.
type sample struct {
	rig.Tally
	busy time.Duration
}

// rate is tunnels, or bytes, per second.
func (s sample) rate() float64 { return float64(s.Made) / s.Seconds }

// cpu is the seconds that the proxy computed for 1,000 tunnels, or a GB.
func (s sample) cpu(scene string) float64 {
	unit := 1e3
	if scene == kindBulk {
		unit = 1e9
	}
	return s.busy.Seconds() / float64(max(s.Made, 1)) * unit
}

type bench struct {
	*rig.Ground
	settings
	origin  string
	loader  *rig.Process
	load    *rig.Loader[order, rig.Tally]
	proxies []*proxy // ours first
	got     map[cell][]sample
}

// start starts the host outside, the load and every proxy.
func (b *bench) start(ctx context.Context) (err error) {
	if b.origin, err = rig.FreePort(); err != nil {
		return err
	}
	far, err := rig.Spawn(b.Dir, "origin", b.Self, "origin", b.origin)
	if err != nil {
		return err
	}
	b.AtEnd(far.Stop)
	socket := filepath.Join(b.Dir, "load.sock")
	if b.loader, err = rig.Spawn(b.Dir, "load", b.Self, "load", socket); err != nil {
		return err
	}
	b.AtEnd(b.loader.Stop)
	if err := errors.Join(far.Await(ctx, "tcp", b.origin), b.loader.Await(ctx, "unix", socket)); err != nil {
		return err
	}
	if b.load, err = rig.DialLoader[order, rig.Tally](socket); err != nil {
		return err
	}
	ours, err := b.gate(ctx, "ours", b.rules)
	if err != nil {
		return err
	}
	b.proxies = []*proxy{ours}
	if b.profile == "" {
		squid, err1 := b.squid(ctx)
		tiny, err2 := b.tinyproxy(ctx)
		if err := errors.Join(err1, err2); err != nil {
			return err
		}
		b.proxies = append(b.proxies, squid, tiny)
	}
	for _, p := range b.proxies {
		if err := b.answers(ctx, p); err != nil {
			return err
		}
	}
	return nil
}

// asked is what a proxy is asked in a scene.
func (b *bench) asked(p *proxy, scene string) order {
	o := p.order
	o.Kind, o.Callers, o.Warm, o.For = scene, b.callers, b.warm, b.each
	if scene == kindBulk {
		o.Callers = 4
	}
	return o
}

// answers waits until the policy has reached a gateway.
func (b *bench) answers(ctx context.Context, p *proxy) error {
	o := b.asked(p, kindCold)
	o.Callers, o.Warm, o.For = 1, 0, 20*time.Millisecond
	for end := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		r, err := b.load.Do(o, func() {})
		switch {
		case err != nil:
			return err
		case r.Made > 0 && r.Fault == "":
			return nil
		case ctx.Err() != nil || time.Now().After(end):
			return fmt.Errorf("%s does not answer: %s\n%s", p.name, r.Fault, p.process.Log())
		}
	}
}

// one is a round of a proxy.
func (b *bench) one(p *proxy, scene string) (s sample, err error) {
	pids := p.process.PIDs(p.workers)
	var from time.Duration
	var err1 error
	s.Tally, err = b.load.Do(b.asked(p, scene), func() { from, err1 = rig.CPUOf(pids...) })
	if err == nil && s.Fault != "" {
		err = errors.New(s.Fault)
	}
	if err = errors.Join(err, err1); err != nil {
		return s, fmt.Errorf("%s, %s: %w", p.name, scene, err)
	}
	s.busy, err = rig.CPUOf(pids...)
	s.busy -= from
	return s, err
}

// rounds measures proxies under scenes, in turn.
func (b *bench) rounds(ctx context.Context, proxies []*proxy, scenes []string, res *rig.Result) error {
	turn := slices.Clone(proxies)
	for range b.settings.rounds {
		for _, sc := range scenes {
			for _, p := range turn {
				if ctx.Err() != nil {
					return context.Cause(ctx)
				}
				one, err := b.one(p, sc)
				if err != nil {
					return err
				}
				if sc != kindBulk {
					res.Cases.Tried += one.Made
					res.Cases.Passed += one.Made
				}
				b.got[cell{sc, p.name}] = append(b.got[cell{sc, p.name}], one)
			}
			slices.Reverse(turn) // nobody is always first
		}
	}
	return nil
}

var scenes = []string{kindCold, kindWarm, kindBulk}

// play measures all there is.
func (b *bench) play(ctx context.Context, w io.Writer, res *rig.Result) error {
	if err := b.rounds(ctx, b.proxies, scenes, res); err != nil {
		return err
	}
	b.table(w, b.proxies, scenes)
	for _, p := range b.proxies[1:] {
		res.Figures[p.name+"_setup_ratio"] = b.ratio(kindCold, b.proxies[0], p)
		res.Figures[p.name+"_setup_warm_ratio"] = b.ratio(kindWarm, b.proxies[0], p)
		res.Figures[p.name+"_bulk_ratio"] = b.ratio(kindBulk, b.proxies[0], p)
	}
	for _, sc := range scenes {
		res.Figures[sc+"_per_second"] = b.median(sc, b.proxies[0], sample.rate)
	}
	if b.idle > 0 {
		mb, err := b.idleTunnels(res)
		if err != nil {
			return err
		}
		res.Figures["rss_mb_per_10000_idle"] = mb
		fmt.Fprintf(w, "%d idle tunnels of one workload: %.1f MB for 10,000\n", b.idle, mb)
	}
	if b.many {
		return b.manyRules(ctx, w, res)
	}
	return nil
}

// manyRows are the numbers of rows that are compared, the fewest first.
var manyRows = []int{10, 10_000, 100_000}

// manyRules compares gateways that differ in the number of rows.
func (b *bench) manyRules(ctx context.Context, w io.Writer, res *rig.Result) error {
	var gates []*proxy
	for _, n := range manyRows {
		p, err := b.gate(ctx, fmt.Sprintf("rows-%d", n), n)
		if err == nil {
			err = b.answers(ctx, p)
		}
		if err != nil {
			return err
		}
		gates = append(gates, p)
	}
	of := []string{kindCold, kindWarm}
	if err := b.rounds(ctx, gates, of, res); err != nil {
		return err
	}
	b.table(w, gates, of)
	for i, n := range manyRows[1:] {
		p := gates[i+1]
		res.Figures[fmt.Sprintf("rules_%d_ratio", n)] = min(b.ratio(kindCold, p, gates[0]), b.ratio(kindWarm, p, gates[0]))
	}
	return nil
}

// idleTunnels is what 10,000 idle tunnels hold, MB.
func (b *bench) idleTunnels(res *rig.Result) (float64, error) {
	p := b.proxies[0]
	pids := p.process.PIDs(false)
	before, err := rig.RSSOf(pids...)
	if err != nil {
		return 0, err
	}
	o := b.asked(p, kindIdle)
	o.Callers = (b.idle + perConn - 1) / perConn
	o.Warm, o.For = 0, 12*time.Second
	after := 0.0
	r, err := b.load.Do(o, func() {
		time.Sleep(10 * time.Second) // all are open by then, or Made says so
		after, err = rig.RSSOf(pids...)
	})
	if err != nil {
		return 0, err
	}
	want := int64(o.Callers * perConn)
	res.Cases.Tried += want
	res.Cases.Passed += min(want, r.Made)
	if res.Cases.Failed += want - min(want, r.Made); r.Fault != "" {
		return 0, errors.New(r.Fault)
	}
	return (after - before) / float64(want) * 10_000, nil
}

func (b *bench) median(scene string, p *proxy, f func(sample) float64) float64 {
	var v []float64
	for _, one := range b.got[cell{scene, p.name}] {
		v = append(v, f(one))
	}
	return rig.Quantile(v, 0.5)
}

func (b *bench) table(w io.Writer, proxies []*proxy, scenes []string) {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "scene\tproxy\tper second\tCPU s/1,000 or GB\t")
	for _, sc := range scenes {
		for _, p := range proxies {
			rate, unit := b.median(sc, p, sample.rate), ""
			if sc == kindBulk {
				rate, unit = rate/1e6, " MB"
			}
			fmt.Fprintf(t, "%s\t%s\t%.0f%s\t%.3f\t\n", sc, p.name, rate, unit, b.median(sc, p, func(s sample) float64 { return s.cpu(sc) }))
		}
	}
	_ = t.Flush()
}

// ratio is the median over the rounds.
func (b *bench) ratio(scene string, p, q *proxy) float64 {
	ours, theirs := b.got[cell{scene, p.name}], b.got[cell{scene, q.name}]
	var v []float64
	for i := range ours {
		if theirs[i].Made > 0 { // on a busy machine a round may pass without one
			v = append(v, ours[i].rate()/theirs[i].rate())
		}
	}
	return rig.Quantile(v, 0.5)
}

// profileTo writes what the gateway does under one scene.
func (b *bench) profileTo(ctx context.Context, file string) error {
	done := make(chan error, 1)
	o, p := b.asked(b.proxies[0], b.settings.scene), b.proxies[0]
	o.For = 12 * time.Second
	r, err := b.load.Do(o, func() {
		go func() { done <- p.process.Profile(ctx, file, 10*time.Second) }()
	})
	if err == nil {
		fmt.Printf("%.0f/s %s\n", sample{Tally: r}.rate(), r.Fault)
	}
	return errors.Join(err, <-done)
}
