package telemetry

import (
	"encoding/hex"
	"math"
	"sync"
	"sync/atomic"
	"time"

	dto "github.com/prometheus/client_model/go"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// bounds are the classic buckets, those of OpenTelemetry's
// http.server.request.duration.
var bounds = [...]time.Duration{
	5 * time.Millisecond, 10 * time.Millisecond, 25 * time.Millisecond, 50 * time.Millisecond, 75 * time.Millisecond, 100 * time.Millisecond, 250 * time.Millisecond,
	500 * time.Millisecond, 750 * time.Millisecond, time.Second, 2500 * time.Millisecond, 5 * time.Second, 7500 * time.Millisecond, 10 * time.Second,
}

// The native buckets are those of Prometheus' schema 3: eight to a doubling,
// each 9 % wider than the one before. What takes less than 2^least seconds, about
// a microsecond, is in the bucket of zero; what takes longer than 2^most, a day
// and a half, in the last one.
const (
	schema    = 3
	perOctave = 1 << schema
	least     = -20
	most      = 17
	least2    = 953 * time.Nanosecond // 2^least seconds
)

// steps are where the buckets of one doubling begin, for fractions as math.Frexp
// gives them.
var steps = func() (s [perOctave]float64) {
	for i := range s {
		s[i] = math.Exp2(float64(i)/perOctave) / 2
	}
	return s
}()

// A Histogram counts durations, in classic buckets and in native ones, and
// remembers a trace for each of the classic. To count takes three additions and
// allocates nothing, but for what was never needed before. A nil Histogram counts
// nothing.
type Histogram struct {
	sum     atomic.Int64 // nanoseconds
	zero    atomic.Uint64
	native  [most - least]atomic.Pointer[[perOctave]atomic.Uint64]
	classic [len(bounds) + 1]atomic.Uint64
	traces  atomic.Pointer[[len(bounds) + 1]exemplar]
}

// An exemplar is a call of a bucket whose trace is kept.
type exemplar struct {
	mu    sync.Mutex // guards the fields below; who finds it taken goes on
	trace [16]byte
	took  time.Duration
	at    time.Time
}

// Observe counts n times d.
func (h *Histogram) Observe(d time.Duration, n int) {
	if h != nil && n > 0 {
		h.add(max(d, 0), uint64(n))
	}
}

// observe counts d. A trace that is kept is remembered.
func (h *Histogram) observe(d time.Duration, t *Trace, now time.Time) {
	d = max(d, 0)
	i := h.add(d, 1)
	if t != nil && t.Sampled {
		h.remember(i, d, t.ID, now)
	}
}

// add counts n times d and returns its classic bucket.
func (h *Histogram) add(d time.Duration, n uint64) int {
	h.addNative(d, n) // before the classic: a scrape reads them the other way round
	i := 0
	for i < len(bounds) && d > bounds[i] {
		i++
	}
	h.classic[i].Add(n)
	h.sum.Add(int64(d) * int64(n))
	return i
}

func (h *Histogram) addNative(d time.Duration, n uint64) {
	if d <= least2 {
		h.zero.Add(n)
		return
	}
	frac, exp := math.Frexp(d.Seconds())
	// The bucket holds its upper bound, and not its lower one.
	step := 0
	for step < perOctave && frac > steps[step] {
		step++
	}
	octave := exp - 1 // the bounds are 2^(exp-1) * 2^(i/8)
	if step == 0 {
		octave, step = octave-1, perOctave
	}
	i := min(max(octave-least, 0), len(h.native)-1)
	o := h.native[i].Load()
	if o == nil {
		o = new([perOctave]atomic.Uint64)
		if !h.native[i].CompareAndSwap(nil, o) {
			o = h.native[i].Load()
		}
	}
	o[step-1].Add(n)
}

func (h *Histogram) remember(i int, d time.Duration, id [16]byte, now time.Time) {
	all := h.traces.Load()
	if all == nil {
		all = new([len(bounds) + 1]exemplar)
		if !h.traces.CompareAndSwap(nil, all) {
			all = h.traces.Load()
		}
	}
	e := &all[i]
	if !e.mu.TryLock() {
		return
	}
	e.trace, e.took, e.at = id, d, now
	e.mu.Unlock()
}

func (h *Histogram) count() (n uint64) {
	for i := range h.classic {
		n += h.classic[i].Load()
	}
	return n
}

func (h *Histogram) mark() (uint64, bool) { return h.count(), true }

func (h *Histogram) write(m *dto.Metric, _ time.Time) bool {
	out := &dto.Histogram{Schema: ptr(int32(schema)), ZeroThreshold: ptr(math.Exp2(least))}
	sum := uint64(0)
	for i := range h.classic {
		sum += h.classic[i].Load()
		le := math.Inf(1)
		if i < len(bounds) {
			le = bounds[i].Seconds()
		}
		out.Bucket = append(out.Bucket, &dto.Bucket{CumulativeCount: ptr(sum), UpperBound: ptr(le), Exemplar: h.exemplar(i)})
	}
	zero := h.zero.Load()
	total := zero + h.spans(out)
	out.ZeroCount, out.SampleCount, out.SampleSum = &zero, &total, ptr(time.Duration(h.sum.Load()).Seconds())
	out.Bucket[len(out.Bucket)-1].CumulativeCount = &total
	m.Histogram = out
	return true
}

// spans writes the native buckets as runs and differences, and returns their sum.
func (h *Histogram) spans(out *dto.Histogram) (total uint64) {
	end, before := 0, int64(0) // of the last bucket written
	for i := range h.native {
		o := h.native[i].Load()
		if o == nil {
			continue
		}
		for step := range o {
			n := o[step].Load()
			if n == 0 {
				continue
			}
			// Bucket k holds what is over 2^((k-1)/8) and not over 2^(k/8).
			k := (i+least)*perOctave + step + 1
			if gap := k - end; len(out.PositiveSpan) == 0 || gap > 0 {
				out.PositiveSpan = append(out.PositiveSpan, &dto.BucketSpan{Offset: ptr(int32(gap)), Length: ptr(uint32(0))})
			}
			*out.PositiveSpan[len(out.PositiveSpan)-1].Length++
			out.PositiveDelta = append(out.PositiveDelta, int64(n)-before)
			end, before = k+1, int64(n)
			total += n
		}
	}
	if len(out.PositiveSpan) == 0 { // how a scraper knows that it is native all the same
		out.PositiveSpan = []*dto.BucketSpan{{Offset: ptr(int32(0)), Length: ptr(uint32(0))}}
	}
	return total
}

func (h *Histogram) exemplar(i int) *dto.Exemplar {
	all := h.traces.Load()
	if all == nil {
		return nil
	}
	e := &all[i]
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.at.IsZero() {
		return nil
	}
	return &dto.Exemplar{
		Label: []*dto.LabelPair{{Name: ptr("trace_id"), Value: ptr(hex.EncodeToString(e.trace[:]))}},
		Value: ptr(e.took.Seconds()), Timestamp: timestamppb.New(e.at),
	}
}

func ptr[T any](v T) *T { return &v }
