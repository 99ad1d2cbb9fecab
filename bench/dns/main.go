// Bench-dns measures how fast a sidecar answers the DNS questions of its workload
// beside unbound and dnsmasq with the same names, asked by dnsperf, all on the
// same cores, in turn.
//
// It prints what it compared, a table, and a line of JSON. A ratio is ours over
// the peer's, the median of the ratios of the rounds; those of questions in a
// second are better the larger, those of latency the smaller.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"slices"
	"syscall"
	"text/tabwriter"
	"time"

	"sallyport/bench/rig"
)

func main() {
	rig.Main("bench-dns", measure, map[string]rig.Role{"idle": idle})
}

// idle is the workload that the sidecar starts.
func idle([]string) error {
	end := make(chan os.Signal, 1)
	signal.Notify(end, syscall.SIGTERM)
	<-end
	return nil
}

// bound is the longest that the bench may take.
const bound = 20 * time.Minute

type settings struct {
	issuer, sidecar string
	rounds          int
	each            time.Duration
	names           int
	rate            int
	profile         string
}

func measure(ctx context.Context, w io.Writer) error {
	var s settings
	flag.StringVar(&s.issuer, "issuer", "bin/issuer", "the issuer's binary")
	flag.StringVar(&s.sidecar, "sidecar", "bin/sidecar", "the sidecar's binary")
	flag.IntVar(&s.rounds, "rounds", 5, "rounds")
	flag.DurationVar(&s.each, "each", time.Second, "how long a server is asked in a round, in whole seconds")
	flag.IntVar(&s.names, "names", 1000, "allowed names")
	flag.IntVar(&s.rate, "rate", 10_000, "questions in a second of the scene that measures latency")
	flag.StringVar(&s.profile, "profile", "", "write a CPU profile of the sidecar under the first scene to FILE, and measure nothing")
	flag.Parse()
	if s.rounds < 1 || s.names < 10 || s.each < time.Second || s.rate < 1 {
		return errors.New("settings: want at least one round, ten names, a second for each and a rate")
	}
	ctx, cancel := context.WithTimeout(ctx, bound)
	defer cancel()
	ground, err := rig.NewGround()
	if err != nil {
		return err
	}
	defer ground.Close()
	b := &bench{Ground: ground, settings: s, got: map[cell][]sample{}}
	if err := b.start(ctx, w); err != nil {
		return err
	}
	if s.profile != "" {
		return b.profileOurs(ctx)
	}
	fmt.Fprintf(w, "settings: %s, %d cores for everything; %s; %d names, A, of ten questions nine for them; %d rounds of %s a server; latency at %d questions/s\n",
		runtime.Version(), runtime.NumCPU(), version("dnsperf", "-h", "Version"), s.names, s.rounds, s.each, s.rate)
	for _, p := range b.servers {
		fmt.Fprintf(w, "  %s: %s\n", p.name, p.settings)
	}
	res := &rig.Result{Name: "bench-dns", Figures: map[string]float64{}}
	if err := b.rounds(ctx, w, res); err != nil {
		return err
	}
	return res.End(w, "not every question was answered as it must be")
}

// A scene is a load that every server is put under.
type scene struct {
	name, questions string
	edns            bool
	rate            bool
	allowed         float64 // the share of questions that NOERROR must answer
}

var scenes = []scene{
	{"90-10", "mixed", false, false, 0.9},
	{"edns", "mixed", true, false, 0.9},
	{"denied", "denied", false, false, 0},
	{"latency", "mixed", false, true, 0.9},
}

type cell struct{ scene, server string }

type bench struct {
	*rig.Ground
	settings
	servers []*server
	got     map[cell][]sample
}

// rounds asks every server under every scene, in turn.
func (b *bench) rounds(ctx context.Context, w io.Writer, res *rig.Result) error {
	turn := slices.Clone(b.servers)
	for range b.settings.rounds {
		for _, sc := range scenes {
			for _, p := range turn {
				one, err := b.ask(ctx, p, sc)
				if err != nil {
					return fmt.Errorf("%s, %s: %w", p.name, sc.name, err)
				}
				if p == b.servers[0] {
					res.Cases.Tried += one.sent
					res.Cases.Passed += one.sent - one.bad
					res.Cases.Failed += one.bad
				}
				b.got[cell{sc.name, p.name}] = append(b.got[cell{sc.name, p.name}], one)
			}
			slices.Reverse(turn) // nobody is always first
		}
	}
	b.table(w)
	for _, peer := range b.servers[1:] {
		for _, sc := range scenes {
			name, f := peer.name+"_ratio_"+sc.name, sample.perSecond
			if sc.rate {
				name, f = peer.name+"_p99_ratio", func(s sample) float64 { return s.p99 }
			}
			res.Figures[name] = b.ratio(sc.name, peer.name, f)
			if !sc.rate {
				res.Figures[peer.name+"_cpu_ratio_"+sc.name] = b.ratio(sc.name, peer.name, sample.cpu)
			}
		}
		res.Figures[peer.name+"_ratio"] = res.Figures[peer.name+"_ratio_"+scenes[0].name]
	}
	for _, p := range b.servers {
		res.Figures[p.name+"_per_s"] = b.median(scenes[0].name, p.name, sample.perSecond)
		res.Figures[p.name+"_p99_us"] = b.median("latency", p.name, func(s sample) float64 { return s.p99 })
	}
	return nil
}

func (b *bench) median(scene, server string, f func(sample) float64) float64 {
	var v []float64
	for _, one := range b.got[cell{scene, server}] {
		v = append(v, f(one))
	}
	return rig.Quantile(v, 0.5)
}

func (b *bench) ratio(scene, peer string, f func(sample) float64) float64 {
	ours, theirs := b.got[cell{scene, b.servers[0].name}], b.got[cell{scene, peer}]
	var v []float64
	for i := range ours {
		v = append(v, f(ours[i])/f(theirs[i]))
	}
	return rig.Quantile(v, 0.5)
}

func (b *bench) table(w io.Writer) {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "scene\tserver\tquestions/s\tCPU s/100k\tp50 us\tp99 us\tRSS MB\t")
	for _, sc := range scenes {
		for _, p := range b.servers {
			m := func(f func(sample) float64) float64 { return b.median(sc.name, p.name, f) }
			fmt.Fprintf(t, "%s\t%s\t%.0f\t%.2f\t%.0f\t%.0f\t%.0f\t\n", sc.name, p.name, m(sample.perSecond), m(sample.cpu),
				m(func(s sample) float64 { return s.p50 }), m(func(s sample) float64 { return s.p99 }), m(func(s sample) float64 { return s.rss }))
		}
	}
	_ = t.Flush()
}
