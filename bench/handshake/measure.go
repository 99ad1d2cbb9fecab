package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"sallyport/bench/rig"
)

// A scene is a key exchange. What has a peer that knows it is compared.
type scene struct {
	name   string
	groups []tls.CurveID
	peers  bool
}

var scenes = []scene{
	{"x25519", []tls.CurveID{tls.X25519}, true},
	{"p256", []tls.CurveID{tls.CurveP256}, true},
	{"x25519mlkem768", []tls.CurveID{tls.X25519MLKEM768}, false}, // what our sidecars agree on by themselves
}

// A cell is a scene with a server.
type cell struct{ scene, server string }

// A sample is what a server did in one round.
type sample struct {
	rig.Tally
	busy time.Duration // of the server
	load time.Duration // of the load process
}

// rate is connections per second.
func (s sample) rate() float64 { return float64(s.Made) / s.Seconds }

// cpu is the seconds that the server computed for 1,000 connections.
func (s sample) cpu() float64 { return s.busy.Seconds() / float64(s.Made) * 1e3 }

// loadCPU is the same of the load process.
func (s sample) loadCPU() float64 { return s.load.Seconds() / float64(s.Made) * 1e3 }

type bench struct {
	*rig.Ground
	settings
	origin  string
	svid    string
	loader  *rig.Process
	load    *rig.Loader[order, rig.Tally]
	servers []*rig.Pair // ours first; of the others the far half serves
	got     map[cell][]sample
}

// start starts all servers, and of each peer keeps the way that takes most.
func (b *bench) start(ctx context.Context, w io.Writer) error {
	if err := b.ours(ctx); err != nil {
		return err
	}
	socket := filepath.Join(b.Dir, "load.sock")
	var err error
	if b.loader, err = rig.Spawn(b.Dir, "load", b.Self, "load", socket); err != nil {
		return err
	}
	b.AtEnd(b.loader.Stop)
	if err := b.loader.Await(ctx, "unix", socket); err != nil {
		return err
	}
	if b.load, err = rig.DialLoader[order, rig.Tally](socket); err != nil {
		return err
	}
	if err := b.answers(ctx, b.servers[0]); err != nil || b.only || b.settings.profile != "" {
		return err
	}
	for _, start := range []func(context.Context, rig.Streams) (*rig.Pair, error){b.NginxStream, b.HAProxyStream} {
		p, err := b.best(ctx, w, start)
		if err != nil {
			return err
		}
		b.servers = append(b.servers, p)
		b.AtEnd(p.Stop)
	}
	return nil
}

// ours starts an issuer and a sidecar before the application, and puts SVIDs
// where the peers look for certificates.
func (b *bench) ours(ctx context.Context) error {
	issuer, err := rig.Start(ctx, rig.Config{Program: b.issuer, Files: policy(b.rules)})
	if err != nil {
		return err
	}
	b.AtEnd(func() { _ = issuer.Close() }) // a directory that stays says so by itself
	far, err1 := rig.FreePort()
	origin, err2 := rig.FreePort()
	if err := errors.Join(err1, err2); err != nil {
		return err
	}
	b.origin = origin
	conf := fmt.Sprintf("inbound: {listen: %q, app: %q}\n", far, origin)
	if b.settings.profile != "" {
		conf += "pprof: true\n"
	}
	server, err := issuer.Sidecar(ctx, b.sidecar, "server", conf, b.Self, "origin", origin)
	if err != nil {
		return err
	}
	b.AtEnd(server.Stop)
	if err := server.Await(ctx, "tcp", origin, far); err != nil {
		return err
	}
	b.servers = []*rig.Pair{{Name: "ours", Far: far, Procs: []*rig.Process{server},
		Settings: fmt.Sprintf("the inbound side of a sidecar, protocol tcp, %d rows, metrics and audit", b.rules)}}
	var roots []byte
	for _, c := range issuer.Roots() {
		roots = append(roots, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	if _, err := b.File("ca.pem", string(roots)); err != nil {
		return err
	}
	for _, name := range []string{"server", "client"} {
		svid, err := issuer.Identity(ctx, "bench-"+name)
		if err != nil {
			return err
		}
		if b.svid, err = b.keep(name+".pem", svid); err != nil {
			return err
		}
	}
	return nil
}

// keep writes certificates and key to one file, as nginx and HAProxy want them.
func (b *bench) keep(name string, svid *tls.Certificate) (string, error) {
	key, err := x509.MarshalPKCS8PrivateKey(svid.PrivateKey.(*ecdsa.PrivateKey))
	if err != nil {
		return "", err
	}
	var text strings.Builder
	for _, c := range svid.Certificate {
		text.Write(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c}))
	}
	text.Write(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key}))
	return b.File(name, text.String())
}

func policy(rows int) map[string]string {
	id := func(name string) string { return "spiffe://" + rig.TrustDomain.Name() + "/ns/bench/sa/" + name }
	var access, entries strings.Builder
	for n := range rows - 1 {
		fmt.Fprintf(&access, "p, r%d, in, %s-%d, %s, 8443, CONNECT, -, -, allow\n", n, id("client"), n, id("origin"))
	}
	fmt.Fprintf(&access, "p, stream, in, %s, %s, 8443, CONNECT, -, -, allow\n", id("client"), id("origin"))
	entries.WriteString("entries:\n")
	for _, e := range [][2]string{{"origin", "server"}, {"peer", "bench-server"}, {"client", "bench-client"}} {
		fmt.Fprintf(&entries, "  - {spiffe_id: %q, parent_id: %q, selectors: [\"child:true\"]}\n", id(e[0]), rig.Agent(e[1]))
	}
	return map[string]string{
		"entries.yaml": entries.String(), "access.csv": access.String(), "guardrails.csv": "", "egress.yaml": "destinations: []\n",
		"services.yaml": fmt.Sprintf("services:\n  - {name: origin, identity: %q, port: 8443, protocol: tcp}\n", id("origin")),
	}
}

// trials is how often each way of a peer is tried, in turn.
const trials = 5

// best starts a peer with one worker and with one for each core, and keeps the
// one that takes most.
func (b *bench) best(ctx context.Context, w io.Writer, start func(context.Context, rig.Streams) (*rig.Pair, error)) (*rig.Pair, error) {
	var ways []*rig.Pair
	var kept *rig.Pair
	defer func() {
		for _, p := range ways {
			if p != kept {
				p.Stop()
			}
		}
	}()
	for _, workers := range slices.Compact([]int{1, runtime.NumCPU()}) {
		p, err := start(ctx, rig.Streams{Origin: b.origin, Group: "X25519:P-256", Workers: workers, Buffer: 16})
		if err != nil {
			return nil, err
		}
		ways = append(ways, p)
	}
	rates := make([][]float64, len(ways))
	for range trials {
		for i, p := range ways {
			one, err := b.measure(p, scenes[0])
			if err != nil {
				return nil, err
			}
			rates[i] = append(rates[i], one.rate())
		}
	}
	most := 0.0
	for i, p := range ways {
		rate := rig.Quantile(rates[i], 0.5)
		fmt.Fprintf(w, "tried %s: %.0f/s\n", p.Name, rate)
		if rate > most {
			kept, most = p, rate
		}
	}
	if kept == nil {
		return nil, errors.New("a peer took no connection")
	}
	return kept, nil
}

func (b *bench) order(p *rig.Pair, sc scene) order {
	return order{Target: p.Far, SVID: b.svid, Groups: sc.groups, Callers: b.callers, Warm: b.warm, For: b.each}
}

// answers waits until the policy has reached the sidecar.
func (b *bench) answers(ctx context.Context, p *rig.Pair) error {
	o := b.order(p, scenes[0])
	o.Callers, o.Warm, o.For = 1, 0, 20*time.Millisecond
	for end := time.Now().Add(30 * time.Second); ; {
		r, err := b.load.Do(o, func() {})
		switch {
		case err != nil:
			return err
		case r.Made > 0 && r.Fault == "":
			return nil
		case ctx.Err() != nil || time.Now().After(end):
			return fmt.Errorf("%s does not answer: %s", p.Name, r.Fault)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// measure is one round of a server. What its other half does is not counted,
// for nobody speaks to that.
func (b *bench) measure(p *rig.Pair, sc scene) (s sample, err error) {
	server, load := p.Procs[0].PIDs(p.Workers), b.loader.PIDs(false)
	var from, loadFrom time.Duration
	var err1, err2 error
	s.Tally, err = b.load.Do(b.order(p, sc), func() {
		from, err1 = rig.CPUOf(server...)
		loadFrom, err2 = rig.CPUOf(load...)
	})
	if err == nil && s.Fault != "" {
		err = errors.New(s.Fault)
	}
	if err = errors.Join(err, err1, err2); err != nil {
		return s, fmt.Errorf("%s, %s: %w", p.Name, sc.name, err)
	}
	s.busy, err1 = rig.CPUOf(server...)
	s.load, err2 = rig.CPUOf(load...)
	s.busy -= from
	s.load -= loadFrom
	return s, errors.Join(err1, err2)
}

// rounds measures every server under every scene, in turn.
func (b *bench) rounds(ctx context.Context, w io.Writer, res *rig.Result) error {
	turn := slices.Clone(b.servers)
	for range b.settings.rounds {
		for _, sc := range scenes {
			for _, p := range turn {
				if p != b.servers[0] && !sc.peers {
					continue
				}
				if ctx.Err() != nil {
					return context.Cause(ctx)
				}
				one, err := b.measure(p, sc)
				res.Cases.Tried += one.Made
				if err != nil {
					return err
				}
				res.Cases.Passed += one.Made
				b.got[cell{sc.name, p.Name}] = append(b.got[cell{sc.name, p.Name}], one)
			}
			slices.Reverse(turn) // nobody is always first
		}
	}
	b.table(w)
	b.figures(res.Figures)
	return nil
}

func (b *bench) median(sc scene, p *rig.Pair, f func(sample) float64) float64 {
	var v []float64
	for _, one := range b.got[cell{sc.name, p.Name}] {
		v = append(v, f(one))
	}
	return rig.Quantile(v, 0.5)
}

func (b *bench) table(w io.Writer) {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "key exchange\tserver\tconnections/s\tCPU s/1,000\tof the load\t")
	for _, sc := range scenes {
		for _, p := range b.servers {
			if b.got[cell{sc.name, p.Name}] != nil {
				fmt.Fprintf(t, "%s\t%s\t%.0f\t%.3f\t%.3f\t\n", sc.name, p.Name, b.median(sc, p, sample.rate), b.median(sc, p, sample.cpu), b.median(sc, p, sample.loadCPU))
			}
		}
	}
	_ = t.Flush()
}

func (b *bench) figures(out map[string]float64) {
	for _, sc := range scenes {
		out["per_second_"+sc.name] = b.median(sc, b.servers[0], sample.rate)
		out["cpu_"+sc.name] = b.median(sc, b.servers[0], sample.cpu)
		for i, name := range []string{"ours", "nginx", "haproxy"} {
			if i == 0 || i >= len(b.servers) || !sc.peers {
				continue
			}
			out[name+"_ratio_"+sc.name] = b.ratio(sc, b.servers[i], sample.rate)
			out[name+"_cpu_ratio_"+sc.name] = b.ratio(sc, b.servers[i], sample.cpu)
			if least, ok := out[name+"_ratio"]; !ok || out[name+"_ratio_"+sc.name] < least {
				out[name+"_ratio"] = out[name+"_ratio_"+sc.name]
			}
		}
	}
}

// ratio is the median over the rounds.
func (b *bench) ratio(sc scene, p *rig.Pair, f func(sample) float64) float64 {
	ours, theirs := b.got[cell{sc.name, b.servers[0].Name}], b.got[cell{sc.name, p.Name}]
	var v []float64
	for i := range ours {
		v = append(v, f(ours[i])/f(theirs[i]))
	}
	return rig.Quantile(v, 0.5)
}

// profile writes what the sidecar does under the first scene.
func (b *bench) profile(ctx context.Context) error {
	done := make(chan error, 1)
	o, p := b.order(b.servers[0], scenes[0]), b.servers[0]
	o.For = 12 * time.Second
	r, err := b.load.Do(o, func() {
		go func() { done <- p.Procs[0].Profile(ctx, b.settings.profile, 10*time.Second) }()
	})
	if err == nil {
		fmt.Printf("%.0f/s\n", sample{Tally: r}.rate())
	}
	return errors.Join(err, <-done)
}
