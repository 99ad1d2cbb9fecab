package rollout

import (
	"math"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"sallyport/internal/mesh"
)

// calls are n of which some failed, and the others took a time each.
func calls(n, failed uint64, took ...time.Duration) mesh.Calls {
	c := mesh.Calls{N: n, Failed: failed}
	for i := range n - failed {
		t := 2 * time.Millisecond
		if len(took) > 0 {
			t = took[int(i)%len(took)]
		}
		c.Took.Count(mesh.Bucket(t), 1)
	}
	return c
}

func TestJudge(t *testing.T) {
	slow := mesh.Judging{Latency: &mesh.Latency{Quantile: 95_00, Ratio: 1.5}}
	for _, tt := range []struct {
		name           string
		j              mesh.Judging
		canary, others mesh.Calls
		want, why      string
	}{
		{"nobody calls", mesh.Judging{}, calls(0, 0), calls(0, 0), mesh.Insufficient, "each needs 100"},
		{"only the others are called", mesh.Judging{}, calls(0, 0), calls(5000, 0), mesh.Insufficient, "the canary has 0 calls"},
		{"only the canary is called", mesh.Judging{}, calls(5000, 0), calls(0, 0), mesh.Insufficient, "the others 0"},
		{"both are well, and enough calls prove it", mesh.Judging{}, calls(1000, 0), calls(1000, 0), mesh.Pass, ""},
		{"enough calls, but too few to exclude one percent", mesh.Judging{}, calls(150, 0), calls(1000, 0), mesh.Insufficient, "more calls would tell"},
		{"the same few calls with a bound that they can prove", mesh.Judging{Errors: 5_00}, calls(150, 0), calls(1000, 0), mesh.Pass, ""},
		{"both fail alike", mesh.Judging{Errors: 5_00}, calls(2000, 100), calls(20000, 1000), mesh.Pass, ""},
		{"the canary does better than the others", mesh.Judging{}, calls(1000, 0), calls(1000, 200), mesh.Pass, ""},
		{"every call to the canary fails, before it has enough", mesh.Judging{}, calls(8, 8), calls(800, 0), mesh.Fail, "8 of 8"},
		{"few failures are an accident", mesh.Judging{}, calls(4, 4), calls(800, 0), mesh.Insufficient, ""},
		{"one failure in ten is no proof", mesh.Judging{}, calls(10, 1), calls(800, 0), mesh.Insufficient, ""},
		{"five percent more than allowed", mesh.Judging{}, calls(1000, 60), calls(10000, 0), mesh.Fail, "and 1% is allowed"},
		{"against others that are not known nothing fails", mesh.Judging{}, calls(1000, 500), calls(0, 0), mesh.Insufficient, ""},
		{"slower than allowed, surely", slow, calls(1000, 0, 50*time.Millisecond), calls(1000, 0, 10*time.Millisecond), mesh.Fail, "more than 1.5 times as long"},
		{"slower, but within what is noise", slow, calls(1000, 0, 3*time.Millisecond), calls(1000, 0, time.Millisecond), mesh.Pass, ""},
		{"slower, and latency is left out", mesh.Judging{Latency: &mesh.Latency{Quantile: 95_00}}, calls(1000, 0, 50*time.Millisecond), calls(1000, 0, 10*time.Millisecond), mesh.Pass, ""},
		{"slow in less than the quantile", slow, calls(1000, 0, times(100, 1)...), calls(1000, 0, 10*time.Millisecond), mesh.Pass, ""},
		{"slow in more than the quantile", slow, calls(1000, 0, times(100, 15)...), calls(1000, 0, 10*time.Millisecond), mesh.Fail, ""},
		{"a quantile that few answers do not tell", mesh.Judging{Errors: 10_00, Latency: &mesh.Latency{Quantile: 99_00, Ratio: 1.5}}, calls(200, 0), calls(1000, 0), mesh.Insufficient, "each side needs 500"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			v := Judge(tt.j, tt.canary, tt.others)
			if v.Verdict != tt.want || !strings.Contains(v.Why, tt.why) || v.Verdict != mesh.Pass && v.Why == "" {
				t.Errorf("%+v, want %s saying %q", v, tt.want, tt.why)
			}
		})
	}
}

// times are of a hundred calls, some of which are slow.
func times(n, slow int) (out []time.Duration) {
	for i := range n {
		out = append(out, 10*time.Millisecond)
		if i < slow {
			out[i] = 100 * time.Millisecond
		}
	}
	return out
}

// A canary that is as good as the others goes back as seldom as the confidence
// says, and one that is much worse always does.
func TestJudgeErrsSeldom(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	draw := func(n int, p float64) mesh.Calls {
		c := mesh.Calls{N: uint64(n)}
		for range n {
			if r.Float64() < p {
				c.Failed++
			}
		}
		return c
	}
	for _, tt := range []struct {
		n              int
		canary, others float64
		fails          func(share float64) bool
		passes         func(share float64) bool
	}{
		{300, 0.02, 0.02, below(0.015), always},
		{300, 0.03, 0.02, below(0.03), below(0.03)}, // just what is allowed
		{1000, 0.05, 0.05, below(0.015), always},
		{1000, 0.10, 0.02, above(0.97), below(0.001)},
		{50, 0.60, 0.02, above(0.99), below(0.001)},
	} {
		const rounds = 300
		n := map[string]int{}
		for range rounds {
			n[Judge(mesh.Judging{Latency: &mesh.Latency{Quantile: 95_00}}, draw(tt.n, tt.canary), draw(4*tt.n, tt.others)).Verdict]++
		}
		if f, p := float64(n[mesh.Fail])/rounds, float64(n[mesh.Pass])/rounds; !tt.fails(f) || !tt.passes(p) {
			t.Errorf("%+v: %.4f fail, %.4f pass", tt, f, p)
		}
	}
}

func below(x float64) func(float64) bool { return func(y float64) bool { return y <= x } }
func above(x float64) func(float64) bool { return func(y float64) bool { return y >= x } }
func always(float64) bool                { return true }

// The bounds are those of the literature: Newcombe 1998, 56 of 70 and 48 of 80.
func TestDifference(t *testing.T) {
	least, most := difference(mesh.Calls{N: 70, Failed: 56}, mesh.Calls{N: 80, Failed: 48}, 1.959964)
	if math.Abs(least-0.0524) > 0.0001 || math.Abs(most-0.3339) > 0.0001 {
		t.Errorf("%.4f to %.4f, want 0.0524 to 0.3339", least, most)
	}
	if z := quantileOfNormal(0.975); math.Abs(z-1.959964) > 1e-6 {
		t.Errorf("%f", z)
	}
}

func TestBuckets(t *testing.T) {
	last := -1
	for d := time.Duration(0); d < 10*time.Minute; d += max(d/50, time.Microsecond) {
		b := mesh.Bucket(d)
		if b < last || b >= mesh.Buckets {
			t.Fatalf("%s is in bucket %d after %d", d, b, last)
		}
		if last = b; mesh.BucketStart(b) > d || b+1 < mesh.Buckets && mesh.BucketStart(b+1) <= d.Truncate(time.Microsecond) {
			t.Fatalf("%s is in the bucket from %s to %s", d, mesh.BucketStart(b), mesh.BucketStart(b+1))
		}
	}
	if last != mesh.Buckets-1 {
		t.Errorf("the last bucket is %d of %d", last, mesh.Buckets)
	}
	var h mesh.Histogram
	for i := range 1000 {
		h.Count(mesh.Bucket(time.Duration(i)*time.Millisecond), 1)
	}
	for _, q := range []float64{0.1, 0.5, 0.95, 0.99} {
		want := time.Duration(q * float64(time.Second))
		if got := atRank(h, q*1000); math.Abs(got.Seconds()/want.Seconds()-1) > 0.05 {
			t.Errorf("the quantile %v is %s, want %s", q, got, want)
		}
	}
}
