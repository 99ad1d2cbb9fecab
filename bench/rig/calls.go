package rig

import (
	"bufio"
	"cmp"
	"errors"
	"fmt"
	"io"
	"net/http"
	"text/tabwriter"
	"time"
)

// Calls is what a load process reports of the time between warming up and the
// end.
type Calls struct {
	Requests int64   `json:"requests"`
	Failed   int64   `json:"failed"`
	Fault    string  `json:"fault,omitempty"`
	Seconds  float64 `json:"seconds"`
	// P50 and P99 are milliseconds; at a rate from the moment the request was due.
	P50 float64 `json:"p50"`
	P99 float64 `json:"p99"`
}

// SkipAnswer reads one whole answer, which must be 200.
func SkipAnswer(r *bufio.Reader) error {
	resp, err := http.ReadResponse(r, nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return errors.New("answered " + resp.Status)
	}
	_, err = io.Copy(io.Discard, resp.Body)
	return err
}

// A Sample is what a pair did in one round.
type Sample struct {
	Calls
	Busy time.Duration // of both proxies
	RSS  float64       // of both, MB
}

// PerSecond is the rate of requests.
func (s Sample) PerSecond() float64 { return float64(s.Requests) / s.Seconds }

// CPU is the seconds that both proxies computed for 100,000 requests.
func (s Sample) CPU() float64 { return s.Busy.Seconds() / float64(s.Requests) * 1e5 }

// MeasureCalls has the load process carry an order out against the pair.
func MeasureCalls[O any](p *Pair, load *Loader[O, Calls], o O) (Sample, error) {
	pids := p.PIDs()
	var before, after time.Duration
	var failed error
	rep, err := load.Do(o, func() { before, failed = CPUOf(pids...) })
	if err != nil || failed != nil {
		return Sample{}, fmt.Errorf("load: %w", cmp.Or(err, failed))
	}
	if after, err = CPUOf(pids...); err != nil {
		return Sample{}, err
	}
	rss, err := RSSOf(pids...)
	return Sample{Calls: rep, Busy: after - before, RSS: rss}, err
}

// A Cell is a scene with a pair.
type Cell struct{ Scene, Pair string }

// Samples are what all rounds gave.
type Samples map[Cell][]Sample

// Add takes a sample in, also into the result, and tells what failed.
func (s Samples) Add(w io.Writer, c Cell, one Sample, res *Result) {
	res.Cases.Tried += one.Requests + one.Failed
	res.Cases.Passed += one.Requests
	res.Cases.Failed += one.Failed
	if one.Failed > 0 {
		fmt.Fprintf(w, "%s, %s: %d connections failed: %s\n", c.Pair, c.Scene, one.Failed, one.Fault)
	}
	s[c] = append(s[c], one)
}

// Median is that of the rounds.
func (s Samples) Median(c Cell, f func(Sample) float64) float64 {
	var v []float64
	for _, one := range s[c] {
		v = append(v, f(one))
	}
	return Quantile(v, 0.5)
}

// Ratio is the median of the ratios of two pairs in each round.
func (s Samples) Ratio(scene, ours, theirs string, f func(Sample) float64) float64 {
	a, b := s[Cell{scene, ours}], s[Cell{scene, theirs}]
	var v []float64
	for i := range a {
		v = append(v, f(a[i])/f(b[i]))
	}
	return Quantile(v, 0.5)
}

// Table prints the medians of every scene and pair that was measured.
func (s Samples) Table(w io.Writer, scenes, pairs []string) {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "scene\tpair\trequests/s\tCPU s/100k\tp50 ms\tp99 ms\tRSS MB\t")
	for _, scene := range scenes {
		for _, pair := range pairs {
			if len(s[Cell{scene, pair}]) == 0 {
				continue
			}
			m := func(f func(Sample) float64) float64 { return s.Median(Cell{scene, pair}, f) }
			fmt.Fprintf(t, "%s\t%s\t%.0f\t%.2f\t%.2f\t%.2f\t%.0f\t\n", scene, pair, m(Sample.PerSecond), m(Sample.CPU),
				m(func(s Sample) float64 { return s.P50 }), m(func(s Sample) float64 { return s.P99 }), m(func(s Sample) float64 { return s.RSS }))
		}
	}
	_ = t.Flush()
}
