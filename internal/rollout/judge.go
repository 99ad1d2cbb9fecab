// Package rollout moves the calls of a route to its canary, step by step, as
// long as the canary does as well as the other backends, and takes them back
// when it does not.
//
// Judge compares the two sides by what the sidecars of the callers have counted
// in the same stretch of time; Look and the moves say what becomes of a rollout
// by that. They do no I/O and read no clock. A Conductor keeps the counts, and
// acts while it has the lease: of the issuers of one store one does.
package rollout

import (
	"fmt"
	"math"
	"time"

	"sallyport/internal/mesh"
)

const (
	// fewFailures is the least number of failed calls that are no accident.
	fewFailures = 5
	// tail is how many calls must lie beyond a quantile to know it.
	tail = 5
	// jitter is what the canary may be slower by, whatever the ratio: less is
	// noise of schedulers and networks.
	jitter = 5 * time.Millisecond
)

// Judge compares the canary with the other backends. It fails as soon as it does
// surely worse than it may, passes when both have enough calls and it surely does
// not, and all else is insufficient.
func Judge(j mesh.Judging, canary, others mesh.Calls) mesh.Verdict {
	j = j.WithDefaults()
	z := quantileOfNormal(float64(j.Confidence) / mesh.Whole)
	v := mesh.Verdict{Canary: figure(canary, j), Others: figure(others, j)}
	v.Least, v.Most = difference(canary, others, z)
	limit := float64(j.Errors) / mesh.Whole
	slow, slowWhy := slower(j, z, canary.Took, others.Took)
	switch least := uint64(j.Minimum); {
	case canary.Failed >= fewFailures && v.Least > limit:
		v.Verdict, v.Why = mesh.Fail, fmt.Sprintf("the canary fails %s of its calls, the others %s: with %s confidence at least %s more, and %s is allowed",
			part(canary), part(others), j.Confidence, percent(v.Least), j.Errors)
	case slow == mesh.Fail:
		v.Verdict, v.Why = mesh.Fail, slowWhy
	case canary.N < least || others.N < least:
		v.Verdict, v.Why = mesh.Insufficient, fmt.Sprintf("the canary has %d calls and the others %d: each needs %d within %s", canary.N, others.N, j.Minimum, j.Window)
	case v.Most > limit:
		v.Verdict, v.Why = mesh.Insufficient, fmt.Sprintf("the canary fails %s of its calls, the others %s: that may be up to %s more, and %s is allowed; more calls would tell",
			part(canary), part(others), percent(v.Most), j.Errors)
	case slow == mesh.Insufficient:
		v.Verdict, v.Why = mesh.Insufficient, slowWhy
	default:
		v.Verdict = mesh.Pass
	}
	return v
}

func figure(c mesh.Calls, j mesh.Judging) mesh.Figure {
	return mesh.Figure{Calls: c.N, Failed: c.Failed, Latency: atRank(c.Took, float64(j.Latency.Quantile)/mesh.Whole*float64(c.Took.Total()))}
}

func part(c mesh.Calls) string {
	return fmt.Sprintf("%d of %d", c.Failed, c.N)
}

func percent(f float64) string { return fmt.Sprintf("%.2f%%", 100*f) }

// difference bounds how much more of its calls the canary fails, by Newcombe's
// hybrid of two Wilson intervals: it holds for few calls and for none that fail,
// where the usual one does not. Each bound is wrong with the chance of z.
func difference(canary, others mesh.Calls, z float64) (least, most float64) {
	pc, lc, uc := wilson(canary, z)
	po, lo, uo := wilson(others, z)
	d := pc - po
	return d - math.Hypot(pc-lc, uo-po), d + math.Hypot(uc-pc, po-lo)
}

// wilson is the part of the calls that failed, and what the true one lies
// between.
func wilson(c mesh.Calls, z float64) (p, low, high float64) {
	if c.N == 0 {
		return 0.5, 0, 1 // nothing is known
	}
	n := float64(c.N)
	p = float64(min(c.Failed, c.N)) / n
	mid := p + z*z/(2*n)
	off := z * math.Sqrt(p*(1-p)/n+z*z/(4*n*n))
	w := 1 + z*z/n
	return p, max((mid-off)/w, 0), min((mid+off)/w, 1)
}

// quantileOfNormal is how many standard deviations a share of all lies below.
func quantileOfNormal(share float64) float64 { return math.Sqrt2 * math.Erfinv(2*share-1) }

// slower compares a quantile of the latencies; empty for well enough. The rank of
// a quantile is known up to the deviation of a binomial.
func slower(j mesh.Judging, z float64, canary, others mesh.Histogram) (verdict, why string) {
	if j.Latency.Ratio == 0 {
		return "", ""
	}
	q := float64(j.Latency.Quantile) / mesh.Whole
	nc, no := float64(canary.Total()), float64(others.Total())
	off := func(n float64) float64 { return z * math.Sqrt(n*q*(1-q)) }
	if need := math.Ceil(tail / (1 - q)); nc < need || no < need {
		return mesh.Insufficient, fmt.Sprintf("%.0f and %.0f answers do not tell the latency that %s stay below: each side needs %.0f", nc, no, j.Latency.Quantile, need)
	}
	allowed := func(t time.Duration) time.Duration {
		return max(time.Duration(float64(t)*j.Latency.Ratio), t+jitter)
	}
	c, o := atRank(canary, nc*q), atRank(others, no*q)
	say := func(verb string) string {
		return fmt.Sprintf("%s of the canary's calls take up to %s, of the others %s: that %s more than %v times as long", j.Latency.Quantile, round(c), round(o), verb, j.Latency.Ratio)
	}
	switch {
	case atRank(canary, nc*q-off(nc)) > allowed(atRank(others, min(no*q+off(no), no))):
		return mesh.Fail, say("is")
	case c > allowed(o):
		return mesh.Insufficient, say("may be")
	}
	return "", ""
}

func round(d time.Duration) time.Duration {
	if d > time.Second {
		return d.Round(10 * time.Millisecond)
	}
	return d.Round(10 * time.Microsecond)
}

// atRank is the time of the call of that rank, the calls of a bucket spread over
// it.
func atRank(h mesh.Histogram, rank float64) time.Duration {
	seen := 0.0
	for i, c := range h {
		if c == 0 {
			continue
		}
		if seen+float64(c) >= rank {
			from, to := mesh.BucketStart(i), mesh.BucketStart(i+1)
			return from + time.Duration(float64(to-from)*min(max((rank-seen)/float64(c), 0), 1))
		}
		seen += float64(c)
	}
	return mesh.BucketStart(len(h))
}
