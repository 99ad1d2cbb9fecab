// Command issuer measures how many X.509-SVIDs a real issuer signs for clients
// over mutual TLS, beside what crypto/x509 alone can do in the same minutes.
//
// The two take turns on the same cores. The ratio compares CPU time, since the
// clients share the cores with the issuer; the rates are of the clock.
package main

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"flag"
	"fmt"
	"io"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"sallyport/bench/rig"
	"sallyport/internal/control"
)

// settings of a run.
type settings struct {
	program         string
	agents, entries int
	clients, batch  int
	rounds          int
	round           time.Duration
}

func main() {
	rig.Main("bench-issuer", run, nil)
}

func run(ctx context.Context, w io.Writer) error {
	var s settings
	flag.StringVar(&s.program, "issuer", "bin/issuer", "the issuer's binary")
	flag.IntVar(&s.agents, "agents", 40, "nodes")
	flag.IntVar(&s.entries, "entries", 250, "entries of each node")
	flag.IntVar(&s.clients, "clients", 4, "nodes that ask at one time")
	flag.IntVar(&s.batch, "batch", 180, "SVIDs asked for in one call, no more than entries")
	flag.IntVar(&s.rounds, "rounds", 5, "rounds of each side")
	flag.DurationVar(&s.round, "round", time.Second, "length of a round")
	flag.Parse()
	if s.entries < 1 || s.batch < 1 || s.batch > s.entries || s.clients < 1 || s.clients > s.agents || s.rounds < 1 {
		return errors.New("settings: want 1 <= batch <= entries, 1 <= clients <= agents, and rounds")
	}
	fmt.Fprintf(w, "settings: %d nodes with %d entries each; %d at a time ask over mutual TLS, %d SVIDs a call; %d rounds of %s a side, in turn; %s, GOMAXPROCS %d; ECDSA P-256; audit on\n",
		s.agents, s.entries, s.clients, s.batch, s.rounds, s.round, runtime.Version(), runtime.GOMAXPROCS(0))
	fmt.Fprintln(w, "raw: crypto/x509 in this process, on every core: parse and verify the request, create the certificate, parse it")
	res := &rig.Result{Name: "bench-issuer", Figures: map[string]float64{}}
	if err := s.measure(ctx, w, "sqlite", "", res); err != nil {
		return err
	}
	pg, err := startPostgres()
	switch {
	case errors.Is(err, errNoPostgres):
		fmt.Fprintln(w, "postgresql: not measured, initdb is not on this machine")
	case err != nil:
		return err
	default:
		defer pg.close()
		if err := s.measure(ctx, w, "postgresql", pg.url, res); err != nil {
			return err
		}
	}
	return res.End(w, "not every SVID was issued")
}

// entriesYAML gives each node its entries.
func (s settings) entriesYAML() string {
	var b strings.Builder
	b.WriteString("entries:\n")
	for a := range s.agents {
		for e := range s.entries {
			fmt.Fprintf(&b, "- {spiffe_id: \"spiffe://%s/n%d/w%d\", parent_id: %q, selectors: [\"unix:uid:%d\"]}\n",
				rig.TrustDomain.Name(), a, e, rig.Agent(nodeName(a)).String(), 1000+e)
		}
	}
	return b.String()
}

func nodeName(n int) string { return fmt.Sprintf("n%d", n) }

// A node is an agent with what it will ask for.
type node struct {
	client *control.Client
	reqs   []control.SVIDRequest
	at     int
}

// measure runs everything against one back end. Figures of SQLite have plain
// names, those of PostgreSQL a prefix.
func (s settings) measure(ctx context.Context, w io.Writer, backend, url string, res *rig.Result) error {
	iss, err := rig.Start(ctx, rig.Config{Program: s.program, Database: url, Files: map[string]string{
		"entries.yaml": s.entriesYAML(), "access.csv": "", "guardrails.csv": "", "services.yaml": "services: []\n", "egress.yaml": "destinations: []\n",
	}})
	if err != nil {
		return err
	}
	defer iss.Close()
	nodes, err := s.join(ctx, iss)
	if err != nil {
		return fmt.Errorf("%w\n%s", err, iss.Log())
	}
	var ours, raw []sample
	limit, err := newLimit()
	if err != nil {
		return err
	}
	for range s.rounds {
		o, err := s.ours(ctx, iss, nodes, res)
		if err != nil {
			return err
		}
		r, err := limit.run(s.round)
		if err != nil {
			return err
		}
		ours, raw = append(ours, o), append(raw, r)
	}
	rss, err := iss.RSS()
	if err != nil {
		return err
	}
	storm, err := s.storm(ctx, iss, nodes, res)
	if err != nil {
		return err
	}
	after, err := iss.RSS()
	if err != nil {
		return err
	}
	f := figures(ours, raw)
	f["rss_mb"], f["storm_s"], f["storm_rss_mb"] = rss, storm.Seconds(), after
	prefix := ""
	if url != "" {
		prefix = backend + "_"
	}
	for k, v := range f {
		res.Figures[prefix+k] = v
	}
	fmt.Fprintf(w, "%s: %.0f SVIDs/s, %.2f CPU s of the issuer per 1,000; raw %.0f/s, %.2f CPU s per 1,000\n",
		backend, f["svids_per_s"], f["issuer_cpu_s_per_1000"], f["raw_per_s"], f["raw_cpu_s_per_1000"])
	fmt.Fprintf(w, "%s: raw_ratio %.2f (CPU per raw certificate / CPU of the issuer per SVID), wall_ratio %.2f (its clients on the same cores: %.0f %% of the CPU of both)\n",
		backend, f["raw_ratio"], f["wall_ratio"], 100*f["client_cpu_share"])
	fmt.Fprintf(w, "%s: RSS %.0f MB; after kill -9 and start, all %d workloads have new SVIDs %.2f s after the start, RSS %.0f MB\n",
		backend, rss, s.agents*s.entries, storm.Seconds(), after)
	return nil
}

// join attests the nodes and makes the keys of their workloads.
func (s settings) join(ctx context.Context, iss *rig.Issuer) ([]*node, error) {
	var nodes []*node
	for a := range s.agents {
		c, err := iss.Join(ctx, nodeName(a))
		if err != nil {
			return nil, err
		}
		entries, err := c.SyncEntries(ctx)
		if err != nil {
			return nil, err
		}
		if len(entries) != s.entries {
			return nil, fmt.Errorf("%s has %d entries, want %d", nodeName(a), len(entries), s.entries)
		}
		n := &node{client: c}
		for _, e := range entries {
			key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
			if err != nil {
				return nil, err
			}
			n.reqs = append(n.reqs, control.SVIDRequest{EntryID: e.ID, ID: e.SPIFFEID, Key: crypto.Signer(key)})
		}
		nodes = append(nodes, n)
	}
	return nodes, nil
}

// next is the node's next batch.
func (n *node) next(size int) []control.SVIDRequest {
	if n.at+size > len(n.reqs) {
		n.at = 0
	}
	n.at += size
	return n.reqs[n.at-size : n.at]
}

// A sample is one round of one side.
type sample struct {
	count     int64
	wall, cpu time.Duration
	// clients is what this process computed beside it.
	clients time.Duration
}

// ours asks the issuer for SVIDs for a round. Nodes take turns, so that none
// spends its budget. The client verifies that each SVID is what it asked for.
func (s settings) ours(ctx context.Context, iss *rig.Issuer, nodes []*node, res *rig.Result) (sample, error) {
	before, err := iss.CPU()
	if err != nil {
		return sample{}, err
	}
	own, err := rig.OwnCPU()
	if err != nil {
		return sample{}, err
	}
	var good, bad atomic.Int64
	errs := make(chan error, s.clients)
	start := time.Now()
	var wg sync.WaitGroup
	for c := range s.clients {
		wg.Go(func() {
			for turn := c; time.Since(start) < s.round; turn += s.clients {
				if turn >= len(nodes) {
					turn = c
				}
				if err := ask(ctx, nodes[turn], s.batch, &good, &bad); err != nil {
					errs <- err
					return
				}
			}
		})
	}
	wg.Wait()
	wall := time.Since(start)
	res.Cases.Tried += good.Load() + bad.Load()
	res.Cases.Passed += good.Load()
	res.Cases.Failed += bad.Load()
	select {
	case err := <-errs:
		return sample{}, fmt.Errorf("%w\n%s", err, iss.Log())
	default:
	}
	after, err := iss.CPU()
	if err != nil {
		return sample{}, err
	}
	ownAfter, err := rig.OwnCPU()
	return sample{good.Load(), wall, after - before, ownAfter - own}, err
}

func ask(ctx context.Context, n *node, size int, good, bad *atomic.Int64) error {
	got, err := n.client.NewX509SVIDs(ctx, n.next(size))
	if err != nil {
		return err
	}
	for _, g := range got {
		if g.Err != nil {
			bad.Add(1)
		} else {
			good.Add(1)
		}
	}
	return nil
}

// storm kills the issuer, starts it, and has every workload of every node get
// a new SVID at once. The time includes the issuer's start.
func (s settings) storm(ctx context.Context, iss *rig.Issuer, nodes []*node, res *rig.Result) (time.Duration, error) {
	iss.Kill()
	start := time.Now()
	if err := iss.Run(ctx); err != nil {
		return 0, err
	}
	var good, bad atomic.Int64
	errs := make(chan error, len(nodes))
	var wg sync.WaitGroup
	for _, n := range nodes {
		wg.Go(func() {
			n.at = 0
			until := time.Now().Add(30 * time.Second)
			for {
				err := ask(ctx, n, len(n.reqs), &good, &bad)
				if err == nil {
					return
				}
				if !errors.Is(err, control.ErrUnreachable) || time.Now().After(until) {
					errs <- err
					return
				}
				<-time.After(50 * time.Millisecond)
			}
		})
	}
	wg.Wait()
	took := time.Since(start)
	res.Cases.Tried += good.Load() + bad.Load()
	res.Cases.Passed += good.Load()
	res.Cases.Failed += bad.Load()
	select {
	case err := <-errs:
		return 0, fmt.Errorf("%w\n%s", err, iss.Log())
	default:
		return took, nil
	}
}

// figures are medians over the rounds.
func figures(ours, raw []sample) map[string]float64 {
	median := func(list []sample, f func(sample) float64) float64 {
		var v []float64
		for _, x := range list {
			v = append(v, f(x))
		}
		return rig.Quantile(v, 0.5)
	}
	rate := func(x sample) float64 { return float64(x.count) / x.wall.Seconds() }
	cpu := func(x sample) float64 { return x.cpu.Seconds() * 1000 / float64(max(1, x.count)) }
	share := func(x sample) float64 { return x.clients.Seconds() / max(0.01, (x.clients+x.cpu).Seconds()) }
	var ratio, wall []float64
	for i := range ours {
		ratio = append(ratio, cpu(raw[i])/cpu(ours[i]))
		wall = append(wall, rate(ours[i])/rate(raw[i]))
	}
	return map[string]float64{
		"svids_per_s": median(ours, rate), "raw_per_s": median(raw, rate),
		"issuer_cpu_s_per_1000": median(ours, cpu), "raw_cpu_s_per_1000": median(raw, cpu),
		"client_cpu_share": median(ours, share),
		"raw_ratio":        rig.Quantile(ratio, 0.5), "wall_ratio": rig.Quantile(wall, 0.5),
	}
}
