// Bench-attack measures what other traffic notices of a hostile peer: ten
// thousand connections at rest, a thousand heads that never end, clients that
// ask for much and read none of it, and floods of resets, at the outbound door
// of a sidecar, at the inbound door of another one, and at a gateway.
//
// The hostile peer is a program of its own that computes only when nobody else
// does (nice 19), on the same cores: what it costs to attack must not count
// against who is attacked. Before each attack the same calls are made in quiet;
// a ratio is the p99 under attack over that, the median of the rounds.
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
	rig.Main("bench-attack", measure, map[string]rig.Role{"load": rig.At(serveLoad), "attack": rig.Load(hostile.run), "origin": rig.At(serveOrigin)})
}

// bound is the longest that the bench may take.
const bound = 30 * time.Minute

type settings struct {
	issuer, sidecar, gateway string
	rounds, rate             int
	each, warm               time.Duration
	scenes                   string
	crowd, slow, deaf        int
	profile                  string
}

func measure(ctx context.Context, w io.Writer) error {
	var s settings
	flag.StringVar(&s.issuer, "issuer", "bin/issuer", "the issuer's binary")
	flag.StringVar(&s.sidecar, "sidecar", "bin/sidecar", "the sidecar's binary")
	flag.StringVar(&s.gateway, "gateway", "bin/gateway", "the gateway's binary")
	flag.IntVar(&s.rounds, "rounds", 5, "rounds")
	flag.IntVar(&s.rate, "rate", 1000, "calls a second of the others")
	flag.DurationVar(&s.each, "each", 2*time.Second, "how long is measured, in quiet and under each attack")
	flag.DurationVar(&s.warm, "warm", 300*time.Millisecond, "how long the calls are made before")
	flag.StringVar(&s.scenes, "scenes", "", "the scenes to measure, with commas between (default all): "+names(scenes))
	flag.IntVar(&s.crowd, "idle", 10_000, "connections at rest")
	flag.IntVar(&s.slow, "loris", 1000, "heads that never end")
	flag.IntVar(&s.deaf, "deaf", 200, "clients that read nothing")
	flag.StringVar(&s.profile, "profile", "", "write a CPU profile of who is attacked in the first scene to this file, and measure nothing")
	flag.Parse()
	wanted := s.wanted()
	if s.rounds < 1 || s.rate < 1 || s.each <= 0 || len(wanted) == 0 {
		return errors.New("settings: want at least one round, one call a second, one scene and some time for each")
	}
	ctx, cancel := context.WithTimeout(ctx, bound)
	defer cancel()
	m, err := start(ctx, s)
	if err != nil {
		return err
	}
	defer m.Close()
	if s.profile != "" {
		return m.profile(ctx, s, wanted[0])
	}
	fmt.Fprintf(w, "settings: %s, %d cores for everything, the attacker at nice 19; %d calls/s on %d connections beside it; %d at rest, %d slow heads, %d that read nothing; %d rounds of %s\n",
		runtime.Version(), runtime.NumCPU(), s.rate, honestConns, s.crowd, s.slow, s.deaf, s.rounds, s.each)
	res := &rig.Result{Name: "bench-attack", Figures: map[string]float64{}}
	if err := m.rounds(ctx, w, s, wanted, res); err != nil {
		return err
	}
	return res.End(w, "not every call was answered, or memory was beyond its budget")
}

// A scene is an attack at a door.
type scene struct{ door, kind string }

func (sc scene) String() string { return sc.door + "-" + sc.kind }

// The doors, and the kinds of attacks. A flood of resets comes by connections, by
// streams of HTTP/2, and by streams of sallyport/1.
const (
	doorOut, doorIn, doorGateway = "out", "in", "gateway"

	kindIdle, kindLoris, kindDeaf       = "idle", "loris", "neverread"
	kindResets, kindRapid, kindHopReset = "reset", "reset_h2", "reset_hop"
)

var scenes = []scene{
	{doorOut, kindIdle}, {doorOut, kindLoris}, {doorOut, kindDeaf}, {doorOut, kindResets}, {doorOut, kindRapid},
	{doorIn, kindIdle}, {doorIn, kindLoris}, {doorIn, kindDeaf}, {doorIn, kindResets}, {doorIn, kindRapid}, {doorIn, kindHopReset},
	{doorGateway, kindIdle}, {doorGateway, kindLoris}, {doorGateway, kindDeaf}, {doorGateway, kindResets}, {doorGateway, kindRapid},
}

func names(list []scene) string {
	var out []string
	for _, sc := range list {
		out = append(out, sc.String())
	}
	return strings.Join(out, ",")
}

// wanted are the scenes that are asked for; a door or a kind means all of its.
func (s settings) wanted() (out []scene) {
	asked := strings.Split(s.scenes, ",")
	for _, sc := range scenes {
		if s.scenes == "" || slices.Contains(asked, sc.String()) || slices.Contains(asked, sc.door) || slices.Contains(asked, sc.kind) {
			out = append(out, sc)
		}
	}
	return out
}

// A sample is what a scene gave in one round.
type sample struct {
	quiet, under rig.Calls
	rss          float64 // of who is attacked, MB
	busy         float64 // cores that it used
	did          toll
}

func (s sample) ratio() float64 { return s.under.P99 / s.quiet.P99 }

// budget is what the process that is attacked may hold, MB: what it needs
// itself, and 64 KB for each connection.
func (s settings) budget() float64 { return 128 + 0.064*float64(max(s.crowd, s.slow, s.deaf)) }

func (m *mesh) rounds(ctx context.Context, w io.Writer, s settings, wanted []scene, res *rig.Result) error {
	got := map[scene][]sample{}
	for range s.rounds {
		for _, sc := range wanted {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			one, err := m.one(s, sc)
			if err != nil {
				return fmt.Errorf("%s: %w", sc, err)
			}
			for _, c := range []rig.Calls{one.quiet, one.under} {
				res.Cases.Tried += c.Requests + c.Failed
				res.Cases.Passed += c.Requests
				res.Cases.Failed += c.Failed
				if c.Failed > 0 {
					fmt.Fprintf(w, "%s: %d connections failed: %s\n", sc, c.Failed, c.Fault)
				}
			}
			got[sc] = append(got[sc], one)
		}
	}
	table(w, wanted, got)
	figures(s, wanted, got, res)
	return nil
}

// one makes the calls in quiet, and then under attack.
func (m *mesh) one(s settings, sc scene) (out sample, err error) {
	o := m.honest(s, sc)
	if out.quiet, err = m.load.Do(o, func() {}); err != nil {
		return out, err
	}
	pids := m.attacked(sc).PIDs(false)
	standing, over := make(chan struct{}), make(chan error, 1)
	go func() {
		var err error
		out.did, err = m.enemy.Do(m.order(s, sc), func() { close(standing) })
		over <- err
	}()
	select {
	case <-standing:
	case err := <-over:
		return out, fmt.Errorf("the attack ended at its start: %w", err)
	}
	time.Sleep(settle) // what it set in motion at its start has come to rest
	var before, after time.Duration
	var failed error
	if out.under, err = m.load.Do(o, func() { before, failed = rig.CPUOf(pids...) }); err != nil {
		return out, err
	}
	after, err = rig.CPUOf(pids...)
	if err = errors.Join(failed, err); err != nil {
		return out, err
	}
	out.busy = (after - before).Seconds() / out.under.Seconds
	if out.rss, err = rig.RSSOf(pids...); err != nil {
		return out, err
	}
	err = <-over
	if err == nil && out.did.Fault != "" {
		err = errors.New(out.did.Fault)
	}
	time.Sleep(settle)
	return out, err
}

// settle is how long an attack is over before the next quiet is measured.
const settle = 500 * time.Millisecond

func medianOf(list []sample, f func(sample) float64) float64 {
	var v []float64
	for _, one := range list {
		v = append(v, f(one))
	}
	return rig.Quantile(v, 0.5)
}

func table(w io.Writer, wanted []scene, got map[scene][]sample) {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "scene\tquiet p50, p99 ms\tattacked p50, p99 ms\tratio\tcores\tRSS MB\tconnections/s\tresets/s\tcut off/s\t")
	for _, sc := range wanted {
		m := func(f func(sample) float64) float64 { return medianOf(got[sc], f) }
		fmt.Fprintf(t, "%s\t%.2f, %.2f\t%.2f, %.2f\t%.2f\t%.2f\t%.0f\t%.0f\t%.0f\t%.0f\t\n", sc,
			m(func(s sample) float64 { return s.quiet.P50 }), m(func(s sample) float64 { return s.quiet.P99 }),
			m(func(s sample) float64 { return s.under.P50 }), m(func(s sample) float64 { return s.under.P99 }),
			m(sample.ratio), m(func(s sample) float64 { return s.busy }), m(func(s sample) float64 { return s.rss }),
			m(func(s sample) float64 { return float64(s.did.Conns) / s.did.Seconds }), m(func(s sample) float64 { return float64(s.did.Resets) / s.did.Seconds }),
			m(func(s sample) float64 { return float64(s.did.Cut) / s.did.Seconds }))
	}
	_ = t.Flush()
}

// figures are those of each scene, and for each kind the worst of all doors.
func figures(s settings, wanted []scene, got map[scene][]sample, res *rig.Result) {
	for _, sc := range wanted {
		ratio := medianOf(got[sc], sample.ratio)
		most := medianOf(got[sc], func(s sample) float64 { return s.rss })
		res.Figures[fmt.Sprintf("p99_%s_ratio_%s", sc.kind, sc.door)] = ratio
		res.Figures[fmt.Sprintf("rss_mb_%s_%s", sc.kind, sc.door)] = most
		kind, _, _ := strings.Cut(sc.kind, "_")
		worst := "p99_" + kind + "_ratio"
		res.Figures[worst] = max(res.Figures[worst], ratio)
		res.Figures["rss_mb"] = max(res.Figures["rss_mb"], most)
		res.Verdicts = append(res.Verdicts, rig.Verdict{Name: "memory of " + sc.String(), OK: most <= s.budget(), Detail: fmt.Sprintf("%.0f MB, the budget is %.0f MB", most, s.budget())})
	}
}

func (m *mesh) profile(ctx context.Context, s settings, sc scene) error {
	o := m.order(s, sc)
	o.For = 12 * time.Second
	call := m.honest(s, sc)
	call.For = 10 * time.Second
	done := make(chan error, 2)
	_, err := m.enemy.Do(o, func() {
		go func() { done <- m.attacked(sc).Profile(ctx, s.profile, 10*time.Second) }()
		go func() { _, err := m.load.Do(call, func() {}); done <- err }()
	})
	return errors.Join(err, <-done, <-done)
}
