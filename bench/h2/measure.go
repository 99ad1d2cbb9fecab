package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"sallyport/bench/rig"
)

// A scene is a load that every pair is put under.
type scene struct {
	name           string
	conns, streams int
	kib            int
	rate           int
}

var (
	plainScenes = []scene{
		{"4x16-1k", 4, 16, 1, 0},
		{"1x64-1k", 1, 64, 1, 0},
		{"64x1-1k", 64, 1, 1, 0},
		{"4x16-64k", 4, 16, 64, 0},
		{"2000rps", 4, 16, 1, 2000},
	}
	grpcScenes = []scene{
		{"4x16-1k", 4, 16, 1, 0},
		{"1x64-1k", 1, 64, 1, 0},
		{"2000rps", 4, 16, 1, 2000},
	}
)

func (sc scene) order(p *pair, s settings) order {
	o := order{Target: p.Target, Path: fmt.Sprintf("/v1/%d", sc.kib), Size: sc.kib << 10, Conns: sc.conns, Streams: sc.streams, Trace: p.trace, Warm: s.warm, For: s.each, Rate: sc.rate}
	if s.grpc {
		o.GRPC, o.Path, o.Size = true, method, len(request)
	}
	return o
}

// A cell is a scene with a pair.
type cell struct{ scene, pair string }

// A sample is what a pair did in one round.
type sample struct {
	report
	busy time.Duration // of both proxies
	rss  float64       // of both, MB
}

func (s sample) rps() float64 { return float64(s.Requests) / s.Seconds }

// cpu is the seconds that both proxies computed for 100,000 requests.
func (s sample) cpu() float64 { return s.busy.Seconds() / float64(s.Requests) * 1e5 }

func median(list []sample, f func(sample) float64) float64 {
	var v []float64
	for _, s := range list {
		v = append(v, f(s))
	}
	return rig.Quantile(v, 0.5)
}

// rounds measures every pair under every scene, in turn.
func (b *bench) rounds(ctx context.Context, w io.Writer, s settings, pairs []*pair, res *rig.Result) error {
	got := map[cell][]sample{}
	for range s.rounds {
		for _, sc := range s.scenes {
			for _, p := range pairs {
				if ctx.Err() != nil {
					return context.Cause(ctx)
				}
				one, err := p.measure(sc.order(p, s))
				if err != nil {
					return fmt.Errorf("%s, %s: %w", p.Name, sc.name, err)
				}
				res.Cases.Tried += one.Requests + one.Failed
				res.Cases.Passed += one.Requests
				res.Cases.Failed += one.Failed
				if one.Failed > 0 {
					fmt.Fprintf(w, "%s, %s: %d connections failed: %s\n", p.Name, sc.name, one.Failed, one.Fault)
				}
				got[cell{sc.name, p.Name}] = append(got[cell{sc.name, p.Name}], one)
			}
			slices.Reverse(pairs) // nobody is always first
		}
	}
	slices.SortStableFunc(pairs, func(a, b *pair) int { return rank(a.Name) - rank(b.Name) })
	table(w, s.scenes, pairs, got)
	figures(res.Figures, s.scenes, pairs, got)
	return nil
}

func (p *pair) measure(o order) (sample, error) {
	pids := p.PIDs()
	var before, after time.Duration
	var failed error
	rep, err := p.load.do(o, func() { before, failed = rig.CPUOf(pids...) })
	if err != nil || failed != nil {
		return sample{}, fmt.Errorf("load: %w", cmp.Or(err, failed))
	}
	if after, err = rig.CPUOf(pids...); err != nil {
		return sample{}, err
	}
	rss, err := rig.RSSOf(pids...)
	return sample{report: rep, busy: after - before, rss: rss}, err
}

// names are how pairs and figures are called.
var names = []string{"ours", "bare", "haproxy", "nginx", "nethttp"}

func rank(pair string) int {
	return slices.IndexFunc(names, func(n string) bool { return strings.HasPrefix(pair, n) })
}

// table prints the medians of every scene and pair.
func table(w io.Writer, scenes []scene, pairs []*pair, got map[cell][]sample) {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "scene\tpair\trequests/s\tCPU s/100k\tp50 ms\tp99 ms\tRSS MB\t")
	for _, sc := range scenes {
		for _, p := range pairs {
			list := got[cell{sc.name, p.Name}]
			m := func(f func(sample) float64) float64 { return median(list, f) }
			fmt.Fprintf(t, "%s\t%s\t%.0f\t%.2f\t%.2f\t%.2f\t%.0f\t\n", sc.name, p.Name, m(sample.rps), m(sample.cpu),
				m(func(s sample) float64 { return s.P50 }), m(func(s sample) float64 { return s.P99 }), m(func(s sample) float64 { return s.rss }))
		}
	}
	_ = t.Flush()
}

// figures are the ratios of the medians' rounds. Those of the first scene have
// no scene in their name.
func figures(out map[string]float64, scenes []scene, pairs []*pair, got map[cell][]sample) {
	for _, sc := range scenes {
		tail := "_" + strings.ReplaceAll(sc.name, "-", "_")
		if sc == scenes[0] {
			tail = ""
		}
		for _, who := range []string{"ours", "bare"} {
			ours, head := got[cell{sc.name, who}], ""
			if who == "bare" {
				head = "bare_"
			}
			for _, p := range pairs {
				if p.Name == "ours" || p.Name == "bare" {
					continue
				}
				theirs, name := got[cell{sc.name, p.Name}], names[rank(p.Name)]
				if sc.rate > 0 {
					out[fmt.Sprintf("%sp99_%s_ratio_%s", head, name, sc.name)] = ratio(ours, theirs, func(s sample) float64 { return s.P99 })
					continue
				}
				out[head+name+"_cpu_ratio"+tail] = ratio(ours, theirs, sample.cpu)
				out[head+name+"_ratio"+tail] = ratio(ours, theirs, sample.rps)
			}
		}
	}
	for _, who := range []string{"ours", "bare"} {
		out[who+"_cpu_s_per_100k"] = median(got[cell{scenes[0].name, who}], sample.cpu)
		out[who+"_rps"] = median(got[cell{scenes[0].name, who}], sample.rps)
	}
}

// ratio is the median over the rounds.
func ratio(a, b []sample, f func(sample) float64) float64 {
	var v []float64
	for i := range a {
		v = append(v, f(a[i])/f(b[i]))
	}
	return rig.Quantile(v, 0.5)
}

// profile writes what both sidecars do under the first scene.
func (b *bench) profile(ctx context.Context, s settings) error {
	p, err := b.ours(ctx, s, false, true)
	if err != nil {
		return err
	}
	done := make(chan error, 2)
	o := s.scenes[0].order(p, s)
	o.For = 12 * time.Second
	_, err = p.load.do(o, func() {
		for i, half := range []string{"server", "client"} {
			go func() { done <- p.Procs[i].Profile(ctx, s.profile+"-"+half, 10*time.Second) }()
		}
	})
	return errors.Join(err, <-done, <-done)
}
