package authz

import (
	"cmp"
	"encoding/json"
	"fmt"
	"net/http"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"sallyport/internal/audit"
	"sallyport/internal/mesh"
	"sallyport/internal/telemetry"
)

// The reasons of the records of calls that a candidate would decide otherwise.
const (
	NewlyAllowed Reason = "newly_allowed"
	NewlyDenied  Reason = "newly_denied"
)

// maxDifferences is how many kinds of differences are told apart. A workload
// can make up destinations; what is beyond counts together.
const maxDifferences = 1024

// A candidate is a Set that is tried beside the one in force: it judges the
// same calls and answers none.
type candidate struct {
	set *Set // nil when it is refused
	// revision and hash are those of the rows; hash stays the same when only
	// something else of the policy changes.
	revision uint64
	hash     string
	refused  string
	seen     *differences
}

// Try compiles rows and judges each call by them, too, beside the set of the
// same policy revision that is in force; nil ends that. An error ends it as
// well. The answers to calls never hang on it.
func (j *Judge) Try(rows *mesh.Snapshot) error {
	if rows == nil {
		j.candidate.Store(nil)
		return nil
	}
	next := &candidate{revision: rows.PolicyRevision, hash: rows.ContentHash()}
	if old := j.candidate.Load(); old != nil && old.set != nil && old.hash == next.hash {
		set := *old.set
		set.revision = next.revision
		next.set, next.seen = &set, old.seen
		j.candidate.Store(next)
		return nil
	}
	set, err := compileApart(rows)
	if err != nil {
		next.refused = err.Error()
		j.candidate.Store(next)
		return fmt.Errorf("candidate: %w", err)
	}
	next.set, next.seen = set, &differences{of: map[differenceKey]*difference{}}
	j.candidate.Store(next)
	j.cfg.Log.Info("candidate is tried beside the policy in force", "revision", next.revision, "rows", set.Len())
	return nil
}

// compileApart is Compile, and a panic is an error.
func compileApart(rows *mesh.Snapshot) (set *Set, err error) {
	defer func() {
		if p := recover(); p != nil {
			set, err = nil, fmt.Errorf("compile policy: panic: %v", p)
		}
	}()
	return Compile(rows)
}

// try judges a call that was decided as d by set. A panic ends the trial and
// nothing else.
func (j *Judge) try(t *candidate, c *Call, set *Set, d Decision, cn *Conn, id string) {
	defer func() {
		if p := recover(); p != nil {
			j.candidate.CompareAndSwap(t, &candidate{revision: t.revision, hash: t.hash, refused: fmt.Sprintf("panic: %v", p)})
			j.cfg.Log.Error("judging by the candidate panicked; it is not tried any more", "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
		}
	}()
	if t.set == nil || set == nil || t.set.revision != set.revision || d.Reason == Internal {
		return
	}
	var would Decision
	if cn == nil {
		would = t.set.Decide(c)
	} else {
		would = cn.slice(&cn.tried, t.set).Decide(c)
	}
	if would = t.set.soften(c, would); would.Allow != d.Allow {
		j.differs(t, c, d, would, id)
	}
}

// differs counts and records a call that the candidate would decide otherwise.
func (j *Judge) differs(t *candidate, c *Call, d, would Decision, id string) {
	k := differenceKey{kind: NewlyDenied, src: srcText(c.Src), dst: c.Dst, rule: cmp.Or(would.Rule, d.Rule)}
	if would.Allow {
		k.kind = NewlyAllowed
	}
	x := t.seen.get(k)
	if x == nil {
		x = t.seen.add(k, j.cfg.Metrics, newDifference(k, c, d, would, id))
	}
	x.count.Add(1)
	x.last.Store(c.Now.UnixNano())
	x.metric.Inc()
	r := j.records.Get().(*audit.Record)
	*r = audit.Record{
		Kind: audit.KindShadow, Decision: audit.Deny, Reason: string(k.kind), Rule: x.key.rule, Dir: string(c.Dir),
		Src: x.key.src, Dst: x.key.dst, Port: c.Port, Verb: c.Verb, Path: c.Path, Revision: t.revision, Trace: c.Trace,
		ID: id, Detail: x.detail,
		// Nobody waits for it: what cannot be kept is counted as lost.
		Open: true,
	}
	if would.Allow {
		r.Decision = audit.Allow
	}
	err := j.cfg.Audit.Append(r)
	j.records.Put(r)
	if err != nil && !t.seen.lost.Swap(true) {
		j.cfg.Log.Error("differences of the candidate are counted and not recorded", "err", err)
	}
}

// A differenceKey is what calls have in common that the candidate would decide
// otherwise; it is empty but for the kind when there are too many.
type differenceKey struct {
	kind           Reason
	src, dst, rule string
}

// difference counts such calls.
type difference struct {
	key    differenceKey
	first  Difference
	detail string
	metric *telemetry.Counter
	count  atomic.Uint64
	last   atomic.Int64 // nanoseconds since 1970
}

type differences struct {
	mu   sync.RWMutex // guards of
	of   map[differenceKey]*difference
	lost atomic.Bool
}

func (s *differences) get(k differenceKey) *difference {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if x := s.of[k]; x != nil || len(s.of) < maxDifferences {
		return x
	}
	return s.of[differenceKey{kind: k.kind}]
}

func (s *differences) add(k differenceKey, m *telemetry.Registry, first Difference) *difference {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.of) >= maxDifferences {
		k = differenceKey{kind: k.kind}
		first = Difference{Kind: k.kind, First: first.First}
	}
	if x := s.of[k]; x != nil {
		return x // somebody else was faster
	}
	k.src, k.dst, k.rule = strings.Clone(k.src), strings.Clone(k.dst), strings.Clone(k.rule)
	x := &difference{key: k, first: first, metric: m.Candidate(string(k.kind), cmp.Or(k.rule, telemetry.Other))}
	if k.rule != "" {
		x.detail = "in force: " + first.InForce + "; candidate: " + first.Candidate
	}
	s.of[k] = x
	return x
}

// list returns what was counted, the most frequent first.
func (s *differences) list() []Difference {
	s.mu.RLock()
	defer s.mu.RUnlock()
	out := make([]Difference, 0, len(s.of))
	for _, x := range s.of {
		d := x.first
		d.Count, d.Last = x.count.Load(), time.Unix(0, x.last.Load()).UTC()
		out = append(out, d)
	}
	slices.SortFunc(out, func(a, b Difference) int {
		return cmp.Or(cmp.Compare(b.Count, a.Count), cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Src, b.Src), cmp.Compare(a.Dst, b.Dst), cmp.Compare(a.Rule, b.Rule))
	})
	return out
}

// A Difference is calls that the candidate would decide otherwise.
type Difference struct {
	Kind Reason `json:"kind"`
	// Rule is the row of the candidate that makes the difference, or the one in
	// force when no row of the candidate speaks of the calls; empty of all that
	// were too many to tell apart.
	Rule string `json:"rule"`
	Dir  string `json:"dir,omitempty"`
	Src  string `json:"src,omitempty"`
	Dst  string `json:"dst,omitempty"`
	// InForce and Candidate say how the two decide.
	InForce   string `json:"in_force,omitempty"`
	Candidate string `json:"candidate,omitempty"`
	// Port, Verb, Path and ID are those of the first call, the path as a
	// template.
	Port  uint16    `json:"port,omitempty"`
	Verb  string    `json:"verb,omitempty"`
	Path  string    `json:"path,omitempty"`
	ID    string    `json:"id,omitempty"`
	Count uint64    `json:"count"`
	First time.Time `json:"first"`
	Last  time.Time `json:"last"`
}

// newDifference holds on to nothing of the caller's.
func newDifference(k differenceKey, c *Call, d, would Decision, id string) Difference {
	return Difference{
		Kind: k.kind, Rule: strings.Clone(k.rule), Dir: string(c.Dir), Src: strings.Clone(k.src), Dst: strings.Clone(k.dst),
		InForce: d.text(), Candidate: would.text(),
		Port: c.Port, Verb: strings.Clone(c.Verb), Path: audit.Template(c.Path), ID: strings.Clone(id), First: c.Now.UTC(),
	}
}

// text is the decision in words.
func (d Decision) text() string {
	effect := "denied"
	if d.Allow {
		effect = "allowed"
	}
	if d.Rule != "" {
		return effect + " by row " + d.Rule
	}
	return effect + ", " + string(d.Reason)
}

// A CandidateReport is what a Judge knows of its candidate.
type CandidateReport struct {
	// Tried is false when there is none, or when it is refused.
	Tried   bool   `json:"tried"`
	Refused string `json:"refused,omitempty"`
	// Revision is the policy revision that the candidate came with.
	Revision    uint64       `json:"revision,omitempty"`
	Hash        string       `json:"hash,omitempty"`
	Rows        int          `json:"rows,omitempty"`
	Differences []Difference `json:"differences"`
}

// Candidate reports what the candidate would decide otherwise.
func (j *Judge) Candidate() CandidateReport {
	t := j.candidate.Load()
	switch {
	case t == nil:
		return CandidateReport{Differences: []Difference{}}
	case t.set == nil:
		return CandidateReport{Refused: t.refused, Revision: t.revision, Hash: t.hash, Differences: []Difference{}}
	}
	return CandidateReport{Tried: true, Revision: t.revision, Hash: t.hash, Rows: t.set.Len(), Differences: t.seen.list()}
}

// CandidateHandler answers "GET /candidate" on the admin socket of a proxy.
func (j *Judge) CandidateHandler() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		// An operator who has gone is no failure of ours.
		_ = json.NewEncoder(w).Encode(j.Candidate())
	})
}
