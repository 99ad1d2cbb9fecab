package authz

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/audit"
	"sallyport/internal/mesh"
	"sallyport/internal/telemetry"
)

// A Recorder keeps decisions. When Append returns nil the record survives the
// death of the process, and its ID is filled. It is safe for concurrent use and
// does not keep the record.
type Recorder interface {
	Append(*audit.Record) error
}

// JudgeConfig is what a Judge needs.
type JudgeConfig struct {
	// Audit keeps every decision. Required.
	Audit Recorder
	// Log receives failures and alarms. Required.
	Log *slog.Logger
	// Environment is what env.name= compares with, such as "prod".
	Environment string
	// Now is the clock. Default time.Now.
	Now func() time.Time
	// CheckEvery is how many decisions pass between two that Run gives to
	// Casbin, too; a power of two. Default 65,536.
	CheckEvery uint64
	// Metrics counts decisions, and what a candidate would decide otherwise.
	// Default: nothing is counted.
	Metrics *telemetry.Registry
}

// Validate reports every mistake by field name.
func (c JudgeConfig) Validate() error {
	var errs []error
	if c.Audit == nil {
		errs = append(errs, errors.New("audit: missing"))
	}
	if c.Log == nil {
		errs = append(errs, errors.New("log: missing"))
	}
	if c.CheckEvery&(c.CheckEvery-1) != 0 {
		errs = append(errs, fmt.Errorf("check every: %d is not a power of two", c.CheckEvery))
	}
	return errors.Join(errs...)
}

// A Judge decides calls by the Set in use and records each decision. It is safe
// for concurrent use.
type Judge struct {
	cfg     JudgeConfig
	set     atomic.Pointer[Set]
	records sync.Pool
	judged  atomic.Uint64
	samples chan sample

	checked, mismatches atomic.Uint64
	// doubted is a Set that disagreed with Casbin once. For it Casbin is asked
	// each time, and the denial of the two counts.
	doubted atomic.Pointer[Set]

	denials denials
	// candidate is nil when none is tried.
	candidate atomic.Pointer[candidate]
}

// sample is a decision to be checked.
type sample struct {
	set  *Set
	call Call
	got  Decision
}

// NewJudge returns a judge that has no policy yet and denies every call.
func NewJudge(cfg JudgeConfig) (*Judge, error) {
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("judge: %w", err)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.CheckEvery == 0 {
		cfg.CheckEvery = 1 << 16
	}
	return &Judge{
		cfg:     cfg,
		records: sync.Pool{New: func() any { return new(audit.Record) }},
		samples: make(chan sample, 1),
	}, nil
}

// Use puts a policy in force for all calls judged from now on. Nil means none.
func (j *Judge) Use(s *Set) { j.set.Store(s) }

// Set returns the policy in force, nil when there is none.
func (j *Judge) Set() *Set { return j.set.Load() }

// Checked counts the decisions about which Casbin was asked, too.
func (j *Judge) Checked() uint64 { return j.checked.Load() }

// Mismatches counts decisions on which the index and Casbin disagreed.
func (j *Judge) Mismatches() uint64 { return j.mismatches.Load() }

// A Grant proves that a call was judged, allowed and recorded. Only a Judge
// makes one; the zero Grant allows nothing.
type Grant struct {
	id, rule, dst string
	port          uint16
	warn          bool
	softened      bool
	tally         audit.Tally
}

// Valid reports whether a Judge made the grant.
func (g Grant) Valid() bool { return g.id != "" }

// ID is the decision id, as in the audit record.
func (g Grant) ID() string { return g.id }

// Rule is the id of the row that allows the call, or of the row that would deny
// it if its file were enforced.
func (g Grant) Rule() string { return g.rule }

// Warn reports whether the call is denied by a file that only warns: the caller
// is to be told.
func (g Grant) Warn() bool { return g.warn }

// Softened reports whether the call is denied, and passes since its file is not
// enforced: what the policy lends to those whom it allows is not for the caller.
func (g Grant) Softened() bool { return g.softened }

// Done tells the record how the call ended: the status that the caller was
// told, 0 when it was told nothing, and the trace. It is called once for each
// grant of a call between workloads.
func (g Grant) Done(status int, trace string) { g.tally.Done(status, trace) }

// Covers reports whether the grant was given for that destination and port.
func (g Grant) Covers(dst string, port uint16) bool {
	return g.id != "" && g.dst == dst && g.port == port
}

// A Denial is the error for a call that is not allowed.
type Denial struct {
	// ID is the decision id, as in the audit record; empty when the record
	// could not be written.
	ID string
	// Rule is the row that denies the call, empty when no row allows it.
	Rule   string
	Reason Reason
}

func (d *Denial) Error() string {
	switch {
	case d.ID == "":
		return fmt.Sprintf("denied: %s (the decision could not be recorded)", d.Reason)
	case d.Rule != "":
		return fmt.Sprintf("denied by row %s (decision %s)", d.Rule, d.ID)
	}
	return fmt.Sprintf("denied: %s (decision %s)", d.Reason, d.ID)
}

// Judge decides a call by the policy in force and records the decision. The
// error is always a *Denial. The environment is the Judge's, whatever the call
// says. The call is not changed and not kept.
func (j *Judge) Judge(c *Call) (Grant, error) { return j.judge(*c, nil) }

// judge decides from the slice of cn, or from the whole set when cn is nil. It
// has its own copy of the call: one that is used again keeps no old time.
func (j *Judge) judge(call Call, cn *Conn) (g Grant, err error) {
	c, set := &call, j.set.Load()
	defer func() {
		if p := recover(); p != nil {
			g, err = Grant{}, j.failed(c, set, p)
		}
	}()
	c.Environment = j.cfg.Environment
	if c.Now.IsZero() {
		c.Now = j.cfg.Now()
	}
	d, sure := j.decide(c, set, cn)
	if n := j.judged.Add(1); n&(j.cfg.CheckEvery-1) == 0 && set != nil {
		j.sample(set, c, d)
	}
	if sure {
		d = set.soften(c, d)
	}
	g, err = j.record(c, set, d)
	j.count(d, cn)
	if t := j.candidate.Load(); t != nil && sure {
		j.try(t, c, set, d, cn, idOf(g, err))
	}
	return g, err
}

// count counts a decision. A connection remembers where its last one counted.
func (j *Judge) count(d Decision, cn *Conn) {
	if j.cfg.Metrics == nil {
		return
	}
	if cn == nil {
		j.counter(d).Inc()
		return
	}
	t := cn.tally.Load()
	if t == nil || t.allow != d.Allow || t.rule != d.Rule {
		t = &ruleCount{allow: d.Allow, rule: d.Rule, n: j.counter(d)}
		cn.tally.Store(t)
	}
	t.n.Inc()
}

func (j *Judge) counter(d Decision) *telemetry.Counter {
	effect := audit.Deny
	if d.Allow {
		effect = audit.Allow
	}
	return j.cfg.Metrics.Authz(d.Rule, string(effect))
}

// ruleCount is where decisions of one kind count.
type ruleCount struct {
	allow bool
	rule  string
	n     *telemetry.Counter
}

// idOf is the decision id that the caller of Judge is told.
func idOf(g Grant, err error) string {
	if d, ok := err.(*Denial); ok { //nolint:errorlint // made here
		return d.ID
	}
	return g.id
}

// decide answers by the rows. Sure is false of a Set that disagreed with Casbin:
// all of its denials are enforced.
func (j *Judge) decide(c *Call, set *Set, cn *Conn) (d Decision, sure bool) {
	if cn == nil {
		d = set.Decide(c)
	} else {
		d = cn.slice(&cn.cur, set).Decide(c)
	}
	if set != nil && j.doubted.Load() == set {
		return j.stricter(set, c, d), false
	}
	return d, true
}

// Allows reports whether Judge would allow the call, by the policy in force and
// at this moment, whatever time the call says. It records nothing and grants
// nothing: it is for what was granted before and goes on.
func (j *Judge) Allows(c *Call) (ok bool) {
	defer func() {
		if p := recover(); p != nil {
			j.cfg.Log.Error("judging a call again panicked; it is not allowed", "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
			ok = false
		}
	}()
	call := *c
	call.Environment, call.Now = j.cfg.Environment, j.cfg.Now()
	set := j.set.Load()
	d, sure := j.decide(&call, set, nil)
	if sure {
		d = set.soften(&call, d)
	}
	return d.Allow
}

// Reaches reports whether the policy in force allows any call at all from src to
// dst, if its conditions hold. It is for connections between calls.
func (j *Judge) Reaches(dir mesh.Direction, src spiffeid.ID, dst string, port uint16) bool {
	return j.set.Load().reaches(dir, src, dst, port)
}

// record writes the decision, and only then makes the grant.
func (j *Judge) record(c *Call, set *Set, d Decision) (Grant, error) {
	r := j.records.Get().(*audit.Record)
	*r = recordOf(c, set, d)
	err := j.cfg.Audit.Append(r)
	id, tally := r.ID, r.Tally
	j.records.Put(r)
	switch {
	case err != nil || id == "":
		if id != "" {
			j.denials.keep(id, c, set, err)
		}
		return Grant{}, &Denial{ID: id, Reason: Unrecorded}
	case !d.Allow:
		j.denials.keep(id, c, set, nil)
		return Grant{}, &Denial{ID: id, Rule: d.Rule, Reason: d.Reason}
	}
	return Grant{id: id, rule: d.Rule, dst: c.Dst, port: c.Port, warn: d.Reason == Warned, softened: d.would != "", tally: tally}, nil
}

func recordOf(c *Call, set *Set, d Decision) audit.Record {
	effect := audit.Deny
	if d.Allow {
		effect = audit.Allow
	}
	service := set.keeping(c.Dst)
	keep := service.By(c.Route)
	// A route may not thin the denials of a service that has each recorded.
	return audit.Record{
		Full: keep.Full || d.would != "" || !d.Allow && service.Full, Open: keep.Open, Detail: detailOf(c, d),
		Kind: audit.KindDecision, Decision: effect, Reason: string(d.Reason), Rule: d.Rule,
		Dir: string(c.Dir), Src: srcText(c.Src), Dst: c.Dst, Port: c.Port, Verb: c.Verb, Path: c.Path,
		Revision: set.Revision(), Trace: c.Trace, Peer: c.Peer,
	}
}

// detailOf says what was not enforced, and by which token the caller came.
func detailOf(c *Call, d Decision) string {
	would, token := wouldDeny[d.would], c.Token.detail()
	if would != "" && token != "" {
		return would + "; " + token
	}
	return would + token
}

func srcText(id spiffeid.ID) string {
	if id.IsZero() {
		return ""
	}
	return id.String()
}

// failed denies after a panic. What panicked may be the recorder.
func (j *Judge) failed(c *Call, set *Set, cause any) (err error) {
	j.cfg.Log.Error("judging a call panicked; it was denied", "panic", fmt.Sprint(cause), "stack", string(debug.Stack()))
	defer func() {
		if recover() != nil {
			err = &Denial{Reason: Internal}
		}
	}()
	_, err = j.record(c, set, Decision{Reason: Internal})
	return err
}

// sample hands a decision to Run. When the one before still waits, or nobody
// runs Run, it is dropped. The copy does not hold on to the caller's buffers.
func (j *Judge) sample(set *Set, c *Call, d Decision) {
	call := *c
	for _, s := range []*string{&call.Dst, &call.Verb, &call.Path, &call.SNI} {
		*s = strings.Clone(*s)
	}
	select {
	case j.samples <- sample{set, call, d}:
	default:
	}
}

// Run checks samples of the decisions against Casbin until ctx ends. A
// disagreement is logged, recorded and counted, and from then on Casbin must
// agree with each decision by that Set.
func (j *Judge) Run(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case s := <-j.samples:
			want, err := s.set.Oracle(&s.call)
			j.compare(s.set, &s.call, s.got, want, err)
		}
	}
}

// compare reports whether Casbin agrees.
func (j *Judge) compare(set *Set, c *Call, got, want Decision, err error) bool {
	j.checked.Add(1)
	if err == nil && got.Allow == want.Allow {
		return true
	}
	j.mismatches.Add(1)
	j.cfg.Metrics.AuthzMismatch().Inc()
	if j.doubted.Swap(set) != set {
		j.cfg.Log.Error("ALARM: the compiled policy and Casbin disagree; both are asked from now on",
			"src", srcText(c.Src), "dst", c.Dst, "port", c.Port, "verb", c.Verb,
			"index", got.Allow, "index_rule", got.Rule, "casbin", want.Allow, "casbin_rule", want.Rule, "error", err)
	}
	r := recordOf(c, set, want)
	r.Decision, r.Reason = audit.Deny, reasonMismatch
	r.Detail = fmt.Sprintf("index: allow=%v rule=%q; casbin: allow=%v rule=%q error=%v", got.Allow, got.Rule, want.Allow, want.Rule, err)
	if err := j.cfg.Audit.Append(&r); err != nil {
		j.cfg.Log.Error("the disagreement could not be recorded", "error", err)
	}
	return false
}

// stricter asks Casbin, too, and returns the denial of the two.
func (j *Judge) stricter(set *Set, c *Call, d Decision) Decision {
	asked := *c // Casbin keeps what it is asked on the heap; c stays off it
	want, err := set.Oracle(&asked)
	if j.compare(set, c, d, want, err) || !d.Allow {
		return d
	}
	return want
}

// A Conn judges the calls of one connection, whose ends do not change. It is
// safe for concurrent use.
type Conn struct {
	judge *Judge
	dir   mesh.Direction
	src   spiffeid.ID
	dst   string
	port  uint16
	// cur is of the set in force, tried of the candidate.
	cur, tried atomic.Pointer[Slice]
	tally      atomic.Pointer[ruleCount]
}

// Conn prepares to judge calls from src to dst.
func (j *Judge) Conn(dir mesh.Direction, src spiffeid.ID, dst string, port uint16) *Conn {
	return &Conn{judge: j, dir: dir, src: src, dst: dst, port: port}
}

// Judge is Judge.Judge for a call on this connection: Dir, Src, Dst and Port
// are those of the connection, whatever the call says.
func (cn *Conn) Judge(c *Call) (Grant, error) {
	call := *c
	call.Dir, call.Src, call.Dst, call.Port = cn.dir, cn.src, cn.dst, cn.port
	return cn.judge.judge(call, cn)
}

// slice returns the rules of the connection in set, made anew when it is not
// the one that cur was made of.
func (cn *Conn) slice(cur *atomic.Pointer[Slice], set *Set) *Slice {
	sl := cur.Load()
	if sl == nil || sl.set != set {
		sl = set.Slice(cn.dir, cn.src, cn.dst, cn.port)
		cur.Store(sl)
	}
	return sl
}
