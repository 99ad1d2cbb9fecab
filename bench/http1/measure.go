package main

import (
	"context"
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
	return order{Target: p.Target, Path: fmt.Sprintf("/v1/%d", sc.kib), Size: sc.kib << 10, Conns: sc.conns, Trace: p.Trace, Warm: s.warm, For: s.each, Rate: sc.rate}
}

// rounds measures every pair under every scene, in turn.
func (b *bench) rounds(ctx context.Context, w io.Writer, s settings, pairs []*pair, res *rig.Result) error {
	got := rig.Samples{}
	for range s.rounds {
		for _, sc := range s.wanted() {
			for _, p := range pairs {
				if told(p) {
					continue
				}
				if err := measureOne(ctx, w, p, sc, sc.order(p, s), got, res); err != nil {
					return err
				}
			}
			slices.Reverse(pairs) // nobody is always first
		}
	}
	if err := toldRounds(ctx, w, s, pairs, got, res); err != nil {
		return err
	}
	slices.SortStableFunc(pairs, func(a, b *pair) int { return rank(a.Name) - rank(b.Name) })
	got.Table(w, namesOf(s.wanted(), func(sc scene) string { return sc.name }), namesOf(pairs, func(p *pair) string { return p.Name }))
	figures(res.Figures, pairs, s.wanted(), got)
	return nil
}

// toldRounds measures what telemetry costs: a few per cent, less than what a machine
// changes by from one second to the next. So the two with it and without it take
// turns that are short and many.
func toldRounds(ctx context.Context, w io.Writer, s settings, pairs []*pair, got rig.Samples, res *rig.Result) error {
	if s.wanted()[0] != scenes[0] {
		return nil
	}
	var both []*pair
	for _, p := range pairs {
		if told(p) {
			both = append(both, p)
		}
	}
	for range s.rounds * toldTurns {
		for _, p := range both {
			o := scenes[0].order(p, s)
			o.Warm, o.For = toldWarm, toldFor
			if err := measureOne(ctx, w, p, scenes[0], o, got, res); err != nil {
				return err
			}
		}
		slices.Reverse(both)
	}
	return nil
}

// Turns in a round, and how long one is.
const (
	toldTurns = 6
	toldWarm  = 100 * time.Millisecond
	toldFor   = 500 * time.Millisecond
)

// told says that the pair is one of the two that show what telemetry costs.
func told(p *pair) bool { return p.Name == "told" || p.Name == "untold" }

// measureOne puts a pair under a load once.
func measureOne(ctx context.Context, w io.Writer, p *pair, sc scene, o order, got rig.Samples, res *rig.Result) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	one, err := rig.MeasureCalls(&p.Pair, p.Load, o)
	if err != nil {
		return fmt.Errorf("%s, %s: %w", p.Name, sc.name, err)
	}
	got.Add(w, rig.Cell{Scene: sc.name, Pair: p.Name}, one, res)
	return nil
}

func namesOf[T any](list []T, name func(T) string) (out []string) {
	for _, x := range list {
		out = append(out, name(x))
	}
	return out
}

// names are how figures call the pairs.
var names = []struct{ pair, figure string }{
	{"ours", "ours"}, {"bare", "bare"}, {"haproxy-t", "haproxy"}, {"haproxy-h2", "haproxy_h2"}, {"nginx", "nginx"}, {"nethttp", "nethttp"}, {"beside", "beside"}, {"told", "told"}, {"untold", "untold"},
}

func rank(pair string) int {
	return slices.IndexFunc(names, func(n struct{ pair, figure string }) bool { return strings.HasPrefix(pair, n.pair) })
}

// figures are the ratios of the medians' rounds. Those of the first scene have
// no scene in their name.
func figures(out map[string]float64, pairs []*pair, wanted []scene, got rig.Samples) {
	for _, sc := range wanted {
		tail := "_" + strings.ReplaceAll(sc.name, "-", "_")
		if sc == scenes[0] {
			tail = ""
		}
		for _, who := range []string{"ours", "bare"} {
			head := ""
			if who == "bare" {
				head = "bare_"
			}
			if got[rig.Cell{Scene: sc.name, Pair: who}] == nil {
				continue
			}
			for _, p := range pairs {
				if slices.Contains([]string{"ours", "bare", "told", "untold"}, p.Name) {
					continue
				}
				name := names[rank(p.Name)].figure
				if sc.rate > 0 {
					out[fmt.Sprintf("%sp99_%s_ratio_%s", head, name, sc.name)] = got.Ratio(sc.name, who, p.Name, func(s rig.Sample) float64 { return s.P99 })
					continue
				}
				out[head+name+"_cpu_ratio"+tail] = got.Ratio(sc.name, who, p.Name, rig.Sample.CPU)
				out[head+name+"_rps_ratio"+tail] = got.Ratio(sc.name, who, p.Name, rig.Sample.PerSecond)
			}
		}
	}
	if slices.ContainsFunc(pairs, func(p *pair) bool { return p.Name == "told" }) && wanted[0] == scenes[0] {
		out["telemetry_cpu_ratio"] = got.Ratio(scenes[0].name, "told", "untold", rig.Sample.CPU)
	}
	for _, who := range []string{"ours", "bare"} {
		if wanted[0] != scenes[0] || got[rig.Cell{Scene: scenes[0].name, Pair: who}] == nil {
			continue
		}
		out[who+"_cpu_s_per_100k"] = got.Median(rig.Cell{Scene: scenes[0].name, Pair: who}, rig.Sample.CPU)
	}
}

// profile writes what both sidecars do under the first scene that is wanted.
func (b *bench) profile(ctx context.Context, s settings) error {
	p, err := b.ours(ctx, s, "ours", true)
	if err != nil {
		return err
	}
	o := s.wanted()[0].order(p, s)
	o.For = 12 * time.Second
	return p.Profile(ctx, s.profile, o)
}
