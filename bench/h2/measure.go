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
	o := order{Target: p.Target, Path: fmt.Sprintf("/v1/%d", sc.kib), Size: sc.kib << 10, Conns: sc.conns, Streams: sc.streams, Trace: p.Trace, Warm: s.warm, For: s.each, Rate: sc.rate}
	if s.grpc {
		o.GRPC, o.Path, o.Size = true, method, len(request)
	}
	return o
}

// rounds measures every pair under every scene, in turn.
func (b *bench) rounds(ctx context.Context, w io.Writer, s settings, pairs []*pair, res *rig.Result) error {
	got := rig.Samples{}
	for range s.rounds {
		for _, sc := range s.scenes {
			for _, p := range pairs {
				if ctx.Err() != nil {
					return context.Cause(ctx)
				}
				one, err := rig.MeasureCalls(&p.Pair, p.Load, sc.order(p, s))
				if err != nil {
					return fmt.Errorf("%s, %s: %w", p.Name, sc.name, err)
				}
				got.Add(w, rig.Cell{Scene: sc.name, Pair: p.Name}, one, res)
			}
			slices.Reverse(pairs) // nobody is always first
		}
	}
	slices.SortStableFunc(pairs, func(a, b *pair) int { return rank(a.Name) - rank(b.Name) })
	got.Table(w, namesOf(s.scenes, func(sc scene) string { return sc.name }), namesOf(pairs, func(p *pair) string { return p.Name }))
	figures(res.Figures, s.scenes, pairs, got)
	return nil
}

func namesOf[T any](list []T, name func(T) string) (out []string) {
	for _, x := range list {
		out = append(out, name(x))
	}
	return out
}

// names are how pairs and figures are called.
var names = []string{"ours", "bare", "haproxy", "nginx", "nethttp", "beside"}

func rank(pair string) int {
	return slices.IndexFunc(names, func(n string) bool { return strings.HasPrefix(pair, n) })
}

// figures are the ratios of the medians' rounds. Those of the first scene have
// no scene in their name.
func figures(out map[string]float64, scenes []scene, pairs []*pair, got rig.Samples) {
	for _, sc := range scenes {
		tail := "_" + strings.ReplaceAll(sc.name, "-", "_")
		if sc == plainScenes[0] {
			tail = ""
		}
		for _, who := range []string{"ours", "bare"} {
			if !slices.ContainsFunc(pairs, func(p *pair) bool { return p.Name == who }) {
				continue
			}
			head := ""
			if who == "bare" {
				head = "bare_"
			}
			for _, p := range pairs {
				if p.Name == "ours" || p.Name == "bare" {
					continue
				}
				name := names[rank(p.Name)]
				if sc.rate > 0 {
					out[fmt.Sprintf("%sp99_%s_ratio_%s", head, name, sc.name)] = got.Ratio(sc.name, who, p.Name, func(s rig.Sample) float64 { return s.P99 })
					continue
				}
				out[head+name+"_cpu_ratio"+tail] = got.Ratio(sc.name, who, p.Name, rig.Sample.CPU)
				out[head+name+"_ratio"+tail] = got.Ratio(sc.name, who, p.Name, rig.Sample.PerSecond)
			}
		}
	}
	for _, who := range []string{"ours", "bare"} {
		if !slices.ContainsFunc(pairs, func(p *pair) bool { return p.Name == who }) || scenes[0] != plainScenes[0] {
			continue
		}
		out[who+"_cpu_s_per_100k"] = got.Median(rig.Cell{Scene: scenes[0].name, Pair: who}, rig.Sample.CPU)
		out[who+"_rps"] = got.Median(rig.Cell{Scene: scenes[0].name, Pair: who}, rig.Sample.PerSecond)
	}
}

// profile writes what both sidecars do under the first scene.
func (b *bench) profile(ctx context.Context, s settings) error {
	p, err := b.ours(ctx, s, "ours", true)
	if err != nil {
		return err
	}
	o := s.scenes[0].order(p, s)
	o.For = 12 * time.Second
	return p.Profile(ctx, s.profile, o)
}
