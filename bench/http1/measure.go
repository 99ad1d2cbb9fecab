package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"sallyport/bench/rig"
)

// A scene is a load that every pair is put under.
type scene struct {
	name       string
	conns, kib int
	rate       int
}

var scenes = []scene{
	{"64c-1k", 64, 1, 0},
	{"64c-64k", 64, 64, 0},
	{"1000c-1k", 1000, 1, 0},
	{"1000c-64k", 1000, 64, 0},
	{"2000rps", 64, 1, 2000},
}

// wanted are the scenes that are asked for.
func (s settings) wanted() (out []scene) {
	for _, sc := range scenes {
		if s.scenes == "" || slices.Contains(strings.Split(s.scenes, ","), sc.name) {
			out = append(out, sc)
		}
	}
	return out
}

func (sc scene) order(p *pair, s settings) order {
	return order{Target: p.Target, Path: fmt.Sprintf("/v1/%d", sc.kib), Size: sc.kib << 10, Conns: sc.conns, Trace: p.trace, Warm: s.warm, For: s.each, Rate: sc.rate}
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
		for _, sc := range s.wanted() {
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
	table(w, pairs, s.wanted(), got)
	figures(res.Figures, pairs, s.wanted(), got)
	return nil
}

func (p *pair) measure(o order) (sample, error) {
	pids := p.PIDs()
	var before, after time.Duration
	var failed error
	rep, err := p.load.Do(o, func() { before, failed = rig.CPUOf(pids...) })
	if err != nil || failed != nil {
		return sample{}, fmt.Errorf("load: %w", cmp.Or(err, failed))
	}
	if after, err = rig.CPUOf(pids...); err != nil {
		return sample{}, err
	}
	rss, err := rig.RSSOf(pids...)
	return sample{report: rep, busy: after - before, rss: rss}, err
}

// names are how figures call the pairs.
var names = []struct{ pair, figure string }{
	{"ours", "ours"}, {"bare", "bare"}, {"haproxy-t", "haproxy"}, {"haproxy-h2", "haproxy_h2"}, {"nginx", "nginx"}, {"nethttp", "nethttp"}, {"beside", "beside"},
}

func rank(pair string) int {
	return slices.IndexFunc(names, func(n struct{ pair, figure string }) bool { return strings.HasPrefix(pair, n.pair) })
}

// figures are the ratios of the medians' rounds. Those of the first scene have
// no scene in their name.
func figures(out map[string]float64, pairs []*pair, wanted []scene, got map[cell][]sample) {
	for _, sc := range wanted {
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
				theirs, name := got[cell{sc.name, p.Name}], names[rank(p.Name)].figure
				if sc.rate > 0 {
					out[fmt.Sprintf("%sp99_%s_ratio_%s", head, name, sc.name)] = ratio(ours, theirs, func(s sample) float64 { return s.P99 })
					continue
				}
				out[head+name+"_cpu_ratio"+tail] = ratio(ours, theirs, sample.cpu)
				out[head+name+"_rps_ratio"+tail] = ratio(ours, theirs, sample.rps)
			}
		}
	}
	for _, who := range []string{"ours", "bare"} {
		if wanted[0] != scenes[0] {
			break
		}
		out[who+"_cpu_s_per_100k"] = median(got[cell{scenes[0].name, who}], sample.cpu)
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

// profile writes what both sidecars do under the first scene that is wanted.
func (b *bench) profile(ctx context.Context, s settings) error {
	p, err := b.ours(ctx, s, "ours", true)
	if err != nil {
		return err
	}
	done := make(chan error, 2)
	o := s.wanted()[0].order(p, s)
	o.For = 12 * time.Second
	_, err = p.load.Do(o, func() {
		for i, half := range []string{"server", "client"} {
			go func() { done <- p.Procs[i].Profile(ctx, s.profile+"-"+half, 10*time.Second) }()
		}
	})
	return errors.Join(err, <-done, <-done)
}
