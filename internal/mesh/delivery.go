package mesh

import (
	"errors"
	"math/bits"
	"slices"
	"time"
)

// A DeliveryState says how the calls of a route are moved to its canary.
type DeliveryState string

const (
	// Measuring counts the calls of the others before a first step that leaves
	// them none.
	Measuring DeliveryState = "measuring"
	// Stepping takes step after step; Gated waits at a gate, Paused was stopped
	// by hand, and Stalled had too few calls for too long. The canary keeps its
	// share, and goes back as soon as it does badly, in all of them.
	Stepping DeliveryState = "stepping"
	Gated    DeliveryState = "gated"
	Paused   DeliveryState = "paused"
	Stalled  DeliveryState = "stalled"
	// Completed gave the canary all calls, RolledBack none. Both hold until the
	// route is edited or somebody starts anew. Superseded was ended by such an
	// edit: the weights of the file hold.
	Completed  DeliveryState = "completed"
	RolledBack DeliveryState = "rolled_back"
	Superseded DeliveryState = "superseded"
)

// A Delivery is a rollout of a route, under way or the last one.
type Delivery struct {
	Service ServiceName `json:"service"`
	Route   string      `json:"route"`
	// Plan is what it was started by, and PlanHash that of Policies.PlanOf.
	Plan     Plan          `json:"plan"`
	PlanHash string        `json:"plan_hash"`
	State    DeliveryState `json:"state"`
	// Step counts from 1; 0 while measuring. Share is that of the canary.
	Step  int   `json:"step"`
	Share Share `json:"share"`
	// By is who started it, Why the reason of the state.
	By  string `json:"by"`
	Why string `json:"why,omitempty"`
	// Since is when the step began, or went on.
	Started time.Time `json:"started"`
	Since   time.Time `json:"since"`
	Ended   time.Time `json:"ended,omitzero"`
	// Verdict is what the last change went by, or how it is judged now.
	Verdict Verdict `json:"verdict"`
	// Before are the calls of the other backends when they last had enough: what
	// the canary is compared with while it has all calls.
	Before Calls `json:"before,omitzero"`

	// Proxies are connected, and Acked of them act on Share.
	Proxies int `json:"proxies"`
	Acked   int `json:"acked"`

	// Revision is that of the record as it was read, 0 for a new one. It is kept
	// only in the place of what was read.
	Revision int64 `json:"-"`
}

// Active says whether it goes on, or may.
func (d *Delivery) Active() bool {
	switch d.State {
	case Measuring, Stepping, Gated, Paused, Stalled:
		return true
	}
	return false
}

// ErrDelivery says why a rollout cannot be moved as it was asked for.
var ErrDelivery = errors.New("rollout")

// How a canary is judged.
const (
	Pass         = "pass"
	Fail         = "fail"
	Insufficient = "insufficient"
)

// A Verdict is how a canary was judged, and by what figures.
type Verdict struct {
	Verdict string `json:"verdict"`
	Why     string `json:"why,omitempty"`
	Canary  Figure `json:"canary"`
	Others  Figure `json:"others"`
	// Least and Most bound how many more calls the canary fails than the others,
	// as a part of one.
	Least float64 `json:"errors_least"`
	Most  float64 `json:"errors_most"`
}

// A Figure sums up the calls of one side.
type Figure struct {
	Calls  uint64 `json:"calls"`
	Failed uint64 `json:"failed"`
	// Latency is the quantile that is compared.
	Latency time.Duration `json:"latency"`
}

// A Sample counts calls of a route to its canary, or to the others, as one proxy
// has made them since its last report.
type Sample struct {
	Service ServiceName
	Route   string
	Canary  bool
	Calls
}

// Calls are counts of tries.
type Calls struct {
	N      uint64    `json:"n"`
	Failed uint64    `json:"failed"`
	Took   Histogram `json:"took,omitzero"`
}

// Add adds what others have counted.
func (c *Calls) Add(o Calls) {
	c.N += o.N
	c.Failed += o.Failed
	for i := range o.Took {
		c.Took.Count(i, o.Took[i])
	}
}

// A Histogram counts times in buckets, four to each doubling of a microsecond:
// what lies between the bounds of one differs by at most a quarter. It ends with
// the last bucket that is not empty.
type Histogram []uint32

// Buckets is how many a Histogram has at most: the last one begins at almost four
// minutes.
const Buckets = 108

// Bucket is the place of a time.
func Bucket(d time.Duration) int {
	us := uint64(max(d/time.Microsecond, 0))
	if us < 4 {
		return int(us)
	}
	e := bits.Len64(us) - 1
	return min(4*(e-1)+int(us>>(e-2)&3), Buckets-1)
}

// BucketStart is the least time of a bucket.
func BucketStart(i int) time.Duration {
	if i < 4 {
		return time.Duration(i) * time.Microsecond
	}
	return time.Duration(4+i&3) << (i/4 - 1) * time.Microsecond
}

// Count adds n to a bucket.
func (h *Histogram) Count(i int, n uint32) {
	if n == 0 {
		return
	}
	for len(*h) <= i {
		*h = append(*h, 0)
	}
	(*h)[i] += n
}

// Clone returns a copy that shares nothing.
func (c Calls) Clone() Calls {
	c.Took = slices.Clone(c.Took)
	return c
}
