// Bench-shadow measures what a call notices of a shadow: calls at a rate through
// a pair of sidecars by a route without one, and by routes of which all calls are
// copied to a shadow that answers, to one that hangs, and to one that is dead.
//
// Each scene is measured beside the one without a shadow, right before it in one
// round and right after it in the next, by the same processes; a ratio is the p99
// of the one over that of the other of the pair, the median of the rounds. The
// scene without a shadow is measured beside itself as well: how far its ratio is
// from 1 is what the machine does on its own.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"path/filepath"
	"runtime"
	"slices"
	"time"

	"sallyport/bench/rig"
)

func main() {
	rig.Main("bench-shadow", measure, map[string]rig.Role{"load": rig.Load(order.run), "origin": rig.At(serveOrigin), "deaf": rig.At(serveDeaf)})
}

// bound is the longest that the bench may take.
const bound = 10 * time.Minute

// scenes are also the services that get the copies, but for the first.
var scenes = []string{"none", "answers", "hangs", "dead"}

type settings struct {
	issuer, sidecar string
	rounds, rate    int
	conns           int
	each, warm      time.Duration
}

func measure(ctx context.Context, w io.Writer) error {
	var s settings
	flag.StringVar(&s.issuer, "issuer", "bin/issuer", "the issuer's binary")
	flag.StringVar(&s.sidecar, "sidecar", "bin/sidecar", "the sidecar's binary")
	flag.IntVar(&s.rounds, "rounds", 30, "rounds")
	flag.IntVar(&s.rate, "rate", 1000, "calls a second")
	flag.IntVar(&s.conns, "conns", 16, "connections")
	flag.DurationVar(&s.each, "each", 500*time.Millisecond, "how long each scene is measured")
	flag.DurationVar(&s.warm, "warm", 100*time.Millisecond, "how long calls are made before")
	flag.Parse()
	if s.rounds < 1 || s.rate < 1 || s.conns < 1 || s.each <= 0 {
		return errors.New("settings: want at least one round, connection and call a second, and some time for each")
	}
	ctx, cancel := context.WithTimeout(ctx, bound)
	defer cancel()
	m, err := start(ctx, s)
	if err != nil {
		return err
	}
	defer m.Close()
	fmt.Fprintf(w, "settings: %s, %d cores for everything, %d calls/s on %d connections, 1 KB; %d rounds of %s\n",
		runtime.Version(), runtime.NumCPU(), s.rate, s.conns, s.rounds, s.each)
	res := &rig.Result{Name: "bench-shadow", Figures: map[string]float64{}}
	if err := m.rounds(ctx, w, s, res); err != nil {
		return err
	}
	return res.End(w, "not every call was answered, or not every kind of copy was made")
}

func (m *mesh) rounds(ctx context.Context, w io.Writer, s settings, res *rig.Result) error {
	p50, p99, ratio := map[string][]float64{}, map[string][]float64{}, map[string][]float64{}
	for n := range s.rounds {
		for _, scene := range scenes {
			var took [2]float64 // without a shadow, and with the scene's
			for half := range took {
				half = (half + n) % 2
				name := []string{scenes[0], scene}[half]
				c, err := m.load.Do(order{Target: m.front, Path: "/v1/" + name, Conns: s.conns, Rate: s.rate, Warm: s.warm, For: s.each}, func() {})
				if err != nil {
					return err
				}
				res.Cases.Tried += c.Requests + c.Failed
				res.Cases.Passed += c.Requests
				res.Cases.Failed += c.Failed
				if c.Failed > 0 {
					fmt.Fprintf(w, "%s: %d connections failed: %s\n", name, c.Failed, c.Fault)
				}
				took[half] = c.P99
				p50[name], p99[name] = append(p50[name], c.P50), append(p99[name], c.P99)
			}
			ratio[scene] = append(ratio[scene], took[1]/took[0])
		}
	}
	fmt.Fprintf(w, "%-10s %8s %8s %10s\n", "shadow", "p50 ms", "p99 ms", "p99 ratio")
	for _, scene := range scenes {
		f := map[string]float64{"p50_ms": rig.Quantile(p50[scene], 0.5), "p99_ms": rig.Quantile(p99[scene], 0.5), "p99_ratio": rig.Quantile(ratio[scene], 0.5)}
		slices.Sort(ratio[scene])
		fmt.Fprintf(w, "%-10s %8.2f %8.2f %10.2f   of %.2f\n", scene, f["p50_ms"], f["p99_ms"], f["p99_ratio"], ratio[scene])
		for name, v := range f {
			res.Figures[scene+"_"+name] = v
		}
	}
	copies, err := m.client.Metric(ctx, "sallyport_shadow_total")
	if err != nil {
		return err
	}
	fmt.Fprintf(w, "copies: %v\n", copies)
	for _, outcome := range []string{"answered", "timeout", "unreachable"} {
		res.Verdicts = append(res.Verdicts, rig.Verdict{Name: "some copies were " + outcome, OK: copies[outcome] > 0})
	}
	return nil
}

// A mesh is a workload that calls another one, and the shadows of that.
type mesh struct {
	*rig.Ground
	client *rig.Process
	front  string // where the client's sidecar takes calls to the origin
	load   *rig.Loader[order, rig.Calls]
}

func start(ctx context.Context, s settings) (_ *mesh, err error) {
	ground, err := rig.NewGround()
	if err != nil {
		return nil, err
	}
	m := &mesh{Ground: ground}
	defer func() {
		if err != nil {
			m.Close()
		}
	}()
	issuer, err := rig.Start(ctx, rig.Config{Program: s.issuer, Files: policy(append([]string{"origin"}, scenes[1:]...))})
	if err != nil {
		return nil, err
	}
	m.AtEnd(func() { _ = issuer.Close() })
	for _, name := range append([]string{"origin"}, scenes[1:]...) {
		role := "origin"
		if name == "hangs" {
			role = "deaf"
		}
		app, in, err := m.Ports()
		if err != nil {
			return nil, err
		}
		p, err := issuer.Sidecar(ctx, s.sidecar, name, fmt.Sprintf("inbound: {listen: %q, app: %q}\n", in, app), m.Self, role, app)
		if err != nil {
			return nil, err
		}
		m.AtEnd(p.Stop)
		if err := p.Await(ctx, "tcp", app, in); err != nil {
			return nil, err
		}
		if name == "dead" {
			p.Kill()
		}
	}
	if m.front, err = rig.FreePort(); err != nil {
		return nil, err
	}
	socket := filepath.Join(m.Dir, "load.sock")
	conf := fmt.Sprintf("shadow: {timeout: 1s}\noutbound: {upstreams: [{service: origin, listen: %q}]}\n", m.front)
	if m.client, err = issuer.Sidecar(ctx, s.sidecar, "client", conf, m.Self, "load", socket); err != nil {
		return nil, err
	}
	m.AtEnd(m.client.Stop)
	if err = errors.Join(m.client.Await(ctx, "unix", socket), m.client.Await(ctx, "tcp", m.front)); err != nil {
		return nil, err
	}
	if m.load, err = rig.DialLoader[order, rig.Calls](socket); err != nil {
		return nil, err
	}
	return m, m.answers(ctx)
}

// answers waits until the policy is in force everywhere.
func (m *mesh) answers(ctx context.Context) error {
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		c, err := m.load.Do(order{Target: m.front, Path: "/v1/answers", Conns: 1, Rate: 20, For: 200 * time.Millisecond}, func() {})
		if err != nil || c.Failed == 0 && c.Requests > 0 {
			return err
		}
		if ctx.Err() != nil || time.Now().After(end) {
			return fmt.Errorf("the origin does not answer: %s", c.Fault)
		}
	}
}

// policy has the client call the services, and the calls by each path copied to the
// service that is called like it.
func policy(names []string) map[string]string {
	id := func(name string) string { return "spiffe://" + rig.TrustDomain.Name() + "/ns/bench/sa/" + name }
	entries := fmt.Appendf(nil, "entries:\n  - {spiffe_id: %q, parent_id: %q, selectors: [\"child:true\"]}\n", id("client"), rig.Agent("client"))
	services, access, routes := []byte("services:\n"), []byte(nil), []byte("service: origin\nroutes:\n")
	for _, name := range names {
		entries = fmt.Appendf(entries, "  - {spiffe_id: %q, parent_id: %q, selectors: [\"child:true\"]}\n", id(name), rig.Agent(name))
		services = fmt.Appendf(services, "  - {name: %s, identity: %q, port: 8443, protocol: http}\n", name, id(name))
		access = fmt.Appendf(access, "p, get-%s, in, %s, %s, 8443, GET, /v1/**, -, allow\n", name, id("client"), id(name))
		if name != "origin" {
			routes = fmt.Appendf(routes, "  - name: %[1]s\n    matches: [{path: {prefix: /v1/%[1]s}}]\n    shadows: [{name: %[1]s, backend: {service: %[1]s}, share: 100%%}]\n", name)
		}
	}
	return map[string]string{
		"entries.yaml": string(entries), "services.yaml": string(services), "access.csv": string(access), "routes/origin.yaml": string(routes),
		"guardrails.csv": "", "egress.yaml": "destinations: []\n",
	}
}
