package agent

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/audit"
	"sallyport/internal/control"
	"sallyport/internal/daemon"
	"sallyport/internal/mesh"
	"sallyport/internal/policyset"
)

const (
	// setsDir holds the signed sets that were in force, each under its revision.
	setsDir = "sets"
	// keepSets is how many of them are kept, the one in force included.
	keepSets = 3
	// badFor is how long a set that was refused is not fetched again: an issuer
	// names it anew with each change of an endpoint.
	badFor = time.Minute
)

// Policy says whose policies a proxy acts on.
type Policy struct {
	// Signers are those who must have signed a set of policies. With them the
	// proxy reads each set itself, whatever the issuer makes of it; the issuer
	// pins keys too. Default: the proxy acts on what the issuer sends.
	Signers policyset.Signers `yaml:"signers"`
}

// Validate reports every mistake, by field.
func (p Policy) Validate() error { return p.Signers.Validate() }

// pins hold a proxy to policies that were signed. One goroutine at a time uses
// them: Open, and then whoever calls the methods of control.Handler.
type pins struct {
	signers policyset.Signers
	kind    string
	td      spiffeid.TrustDomain
	dir     string
	// floor is the newest set that ever was in force: none with a lower revision
	// is taken, and none other with the same.
	floor setName
	// next was looked at last, now is in force; each may be nil.
	next, now *vouched
	// bad is the set that was refused last, why and until when.
	bad struct {
		hash  string
		err   error
		until time.Time
	}
}

// A setName is a set's place in the order of all sets.
type setName struct {
	revision uint64
	hash     string
}

// file is what the set is called on disk, so that a damaged one still counts.
func (n setName) file() string { return fmt.Sprintf("%020d-%s", n.revision, n.hash) }

var setFile = regexp.MustCompile(`^([0-9]{20})-([0-9a-f]{64})$`)

// vouched is a set that enough pinned keys have signed.
type vouched struct {
	setName
	// who is the identity that own is for; own has no endpoints.
	who  spiffeid.ID
	own  *mesh.Snapshot
	keys []policyset.Key
	// file is what is not on disk yet, nil when it is.
	file []byte
}

func (v *vouched) is(hash string, who spiffeid.ID) bool {
	return v != nil && v.hash == hash && v.who == who
}

// openPins finds the sets of earlier runs.
func openPins(cfg Config) (*pins, error) {
	if !cfg.Policy.Signers.Pinned() {
		return nil, nil
	}
	p := &pins{signers: cfg.Policy.Signers, kind: cfg.Kind, td: cfg.TrustDomain, dir: filepath.Join(cfg.DataDir, setsDir)}
	if err := daemon.OwnDir("data_dir", p.dir); err != nil {
		return nil, err
	}
	all, err := p.onDisk()
	if err != nil {
		return nil, fmt.Errorf("look for policy sets: %w", err)
	}
	if len(all) > 0 {
		p.floor = all[0]
	}
	return p, nil
}

// onDisk are the sets that are kept, the newest first.
func (p *pins) onDisk() ([]setName, error) {
	entries, err := os.ReadDir(p.dir)
	if err != nil {
		return nil, err
	}
	var all []setName
	for _, e := range entries {
		m := setFile.FindStringSubmatch(e.Name())
		if m == nil {
			continue
		}
		if n, err := strconv.ParseUint(m[1], 10, 64); err == nil {
			all = append(all, setName{n, m[2]})
		}
	}
	slices.SortFunc(all, func(a, b setName) int {
		return cmp.Or(cmp.Compare(b.revision, a.revision), cmp.Compare(a.hash, b.hash))
	})
	return all, nil
}

// look counts the signatures of the set that a snapshot for who comes from,
// unless it did so before. It is fetched at most once.
func (p *pins) look(who spiffeid.ID, hash string, fetch func() ([]byte, error)) error {
	switch {
	case hash == "":
		return errors.New("the issuer names no signed set of policies; next: write policy.source: pushed and policy.signers into its configuration")
	case p.next.is(hash, who):
		return nil
	case p.now.is(hash, who):
		p.next = nil
		return p.follows(p.now.setName)
	case p.bad.hash == hash && time.Now().Before(p.bad.until):
		return p.bad.err
	}
	v, err := p.kept(who, hash)
	if v == nil {
		var b []byte
		if b, err = fetch(); errors.Is(err, control.ErrUnfetched) {
			return err
		}
		if err == nil {
			v, err = p.read(who, hash, b)
		}
	}
	if err == nil {
		err = p.follows(v.setName)
	}
	if err != nil {
		p.bad.hash, p.bad.err, p.bad.until = hash, err, time.Now().Add(badFor)
		return err
	}
	p.next, p.bad.hash = v, ""
	return nil
}

// kept reads a set from disk, nil when it is not there or no good.
func (p *pins) kept(who spiffeid.ID, hash string) (*vouched, error) {
	all, err := p.onDisk()
	if err != nil {
		return nil, err
	}
	i := slices.IndexFunc(all, func(n setName) bool { return n.hash == hash })
	if i < 0 {
		return nil, fs.ErrNotExist
	}
	b, err := os.ReadFile(filepath.Join(p.dir, all[i].file()))
	if err != nil {
		return nil, err
	}
	v, err := p.read(who, hash, b)
	if err != nil {
		return nil, err
	}
	v.file = nil
	return v, nil
}

// read checks a set: what it is, who has signed it and then what it says.
func (p *pins) read(who spiffeid.ID, hash string, b []byte) (*vouched, error) {
	s, err := policyset.Parse(b)
	if err != nil {
		return nil, err
	}
	if s.Hash() != hash {
		return nil, fmt.Errorf("the issuer gives out set %.12s as set %.12q", s.Hash(), hash)
	}
	if s.TrustDomain != p.td {
		return nil, fmt.Errorf("policy set %.12s is for trust domain %s, this proxy is in %s", hash, s.TrustDomain, p.td)
	}
	if err := p.signers.Verify(s); err != nil {
		return nil, err
	}
	if err := s.InReach(p.floor.revision); err != nil {
		return nil, err
	}
	policies, err := s.Policies()
	if err != nil {
		return nil, fmt.Errorf("policy set %.12s: %w", hash, err)
	}
	whole, err := mesh.Compile(policies, 0, s.Revision, nil)
	if err != nil {
		return nil, fmt.Errorf("policy set %.12s: %w", hash, err)
	}
	whole.PolicySet = hash
	return &vouched{setName: setName{s.Revision, hash}, who: who, own: p.project(whole, who), keys: s.Keys(), file: b}, nil
}

func (p *pins) project(s *mesh.Snapshot, who spiffeid.ID) *mesh.Snapshot {
	if p.kind == control.KindGateway {
		return s.ProjectGateway()
	}
	return s.Project(who)
}

// follows refuses a set that is older than one that was in force.
func (p *pins) follows(n setName) error {
	switch {
	case n.revision < p.floor.revision:
		return fmt.Errorf("policy set %.12s has revision %d, which is lower than %d: that was in force here; next: push above it", n.hash, n.revision, p.floor.revision)
	case n.revision == p.floor.revision && n.hash != p.floor.hash:
		return fmt.Errorf("policy set %.12s has revision %d, as another one that was in force here: %.12s; next: push above it", n.hash, n.revision, p.floor.hash)
	}
	return nil
}

// at is the snapshot that the set says, with the endpoints of s and the shares of
// canaries. Those are of rollouts that the set has: Validate refuses others.
func (p *pins) at(v *vouched, s *mesh.Snapshot) *mesh.Snapshot {
	with := *v.own
	with.Revision, with.Endpoints, with.Shares = s.Revision, s.Endpoints, s.Shares
	return p.project(&with, v.who)
}

// own makes of the issuer's snapshot that of the signed set. They must say the
// same.
func (p *pins) own(s *mesh.Snapshot) (*vouched, *mesh.Snapshot, error) {
	v := p.now
	if p.next != nil && p.next.hash == s.PolicySet {
		v = p.next
	}
	if v == nil || v.hash != s.PolicySet {
		return nil, nil, fmt.Errorf("nobody has looked at policy set %.12q", s.PolicySet)
	}
	if s.PolicyRevision != v.revision {
		return nil, nil, fmt.Errorf("the issuer sends revision %d from policy set %.12s, which has revision %d", s.PolicyRevision, v.hash, v.revision)
	}
	own := p.at(v, s)
	if own.ContentHash() != s.ContentHash() {
		return nil, nil, fmt.Errorf("the issuer sends what policy set %.12s of revision %d does not say: %s", v.hash, v.revision, difference(own, s))
	}
	return v, own, nil
}

// keep puts a set on disk before it is in force, and returns what takes that
// back.
func (p *pins) keep(v *vouched) (undo func(), err error) {
	if v.file == nil {
		return func() {}, nil
	}
	path := filepath.Join(p.dir, v.setName.file())
	if err := daemon.WriteFile(path, v.file, 0o600); err != nil {
		return nil, fmt.Errorf("policy set not kept on disk, so it is not taken: %w", err)
	}
	return func() {
		if v.setName != p.floor {
			os.Remove(path)
		}
	}, nil
}

// took notes that a set is in force, and forgets those that are too many.
func (p *pins) took(v *vouched) error {
	v.file, p.now, p.next = nil, v, nil
	if v.revision > p.floor.revision {
		p.floor = v.setName
	}
	all, err := p.onDisk()
	for _, n := range all[min(len(all), keepSets):] {
		err = errors.Join(err, os.Remove(filepath.Join(p.dir, n.file())))
	}
	return err
}

// resume makes of a snapshot of an earlier run that of the set it came from, or
// of the newer one that was in force last: the end may have come before the
// snapshot of that was kept.
func (p *pins) resume(who spiffeid.ID, s *mesh.Snapshot) (*mesh.Snapshot, error) {
	all, err := p.onDisk()
	if err != nil {
		return nil, err
	}
	last := max(s.PolicyRevision, p.floor.revision)
	i := slices.IndexFunc(all, func(n setName) bool { return n.revision == last })
	if i < 0 {
		return nil, fmt.Errorf("no signed set of revision %d is kept", last)
	}
	v, err := p.kept(who, all[i].hash)
	if err != nil {
		return nil, err
	}
	if v.revision != last {
		return nil, fmt.Errorf("policy set %.12s has revision %d, it is kept as that of revision %d", v.hash, v.revision, last)
	}
	p.now = v
	return p.at(v, s), nil
}

// candidate are the rows to try that the set in force says, if the issuer sends
// those.
func (p *pins) candidate(rows *mesh.Snapshot) (*mesh.Snapshot, error) {
	own := p.now.own.Candidate
	switch {
	case own == nil:
		return nil, fmt.Errorf("the issuer sends rows to try, and policy set %.12s has none", p.now.hash)
	case own.ContentHash() != rows.ContentHash():
		return nil, fmt.Errorf("the issuer sends rows to try that policy set %.12s does not say: %s", p.now.hash, difference(own, rows))
	}
	return own, nil
}

// voucher is control.Hello's Vouch for an identity, nil when nothing is pinned.
func (a *Agent) voucher(who spiffeid.ID) func(context.Context, string, func() ([]byte, error)) error {
	if a.pins == nil {
		return nil
	}
	return func(_ context.Context, set string, fetch func() ([]byte, error)) error {
		err := a.pins.look(who, set, fetch)
		if err == nil || errors.Is(err, control.ErrUnfetched) {
			return err
		}
		return a.rejected(err)
	}
}

// usePinned puts in force what the signed set says that a snapshot comes from,
// once that is recorded and on disk.
func (a *Agent) usePinned(s *mesh.Snapshot) (*mesh.Snapshot, error) {
	v, own, err := a.pins.own(s)
	if err != nil {
		return nil, err
	}
	if v.setName != a.pins.floor {
		if err := a.cfg.Record(&audit.Record{Kind: audit.KindPolicy, Decision: audit.Allow, Revision: v.revision, Detail: fmt.Sprintf("set %s, signed by %v", v.hash, v.keys)}); err != nil {
			return nil, fmt.Errorf("policy set not recorded, so it is not taken: %w", err)
		}
	}
	undo, err := a.pins.keep(v)
	if err != nil {
		return nil, err
	}
	if err := a.use(own); err != nil {
		undo()
		return nil, err
	}
	if err := a.pins.took(v); err != nil {
		a.cfg.Log.Warn("old policy sets not removed", "err", err)
	}
	return own, nil
}

// rejected tells why a snapshot was not taken.
func (a *Agent) rejected(err error) error {
	a.cfg.Metrics.PolicyRejected().Inc()
	a.cfg.Metrics.Reloads("policy", "refused").Inc()
	var in uint64
	if s := a.Snapshot(); s != nil {
		in = s.PolicyRevision
	}
	a.cfg.Log.Error("policy rejected, the former stays in force", "in_force", in, "err", err)
	if a.pins == nil {
		return err
	}
	n, ok := a.refusals.next(time.Now())
	if !ok {
		return err
	}
	detail := err.Error()
	if n > 0 {
		detail = fmt.Sprintf("%s (%d refusals before this one were not recorded)", detail, n)
	}
	if lost := a.cfg.Record(&audit.Record{Kind: audit.KindPolicy, Decision: audit.Deny, Revision: in, Detail: detail}); lost != nil {
		a.cfg.Log.Error("refused policy not recorded", "err", lost)
	}
	return err
}

// refusals bound the records of what an issuer makes a proxy refuse: some at
// once, and then one in refusalEvery.
type refusals struct {
	spent time.Time // when all that was recorded is paid for
	// passed counts those that were not recorded since the last that was.
	passed uint64
}

const (
	refusalEvery = time.Second
	refusalBurst = 60
)

// next says whether to record a refusal, and how many were not before it.
func (r *refusals) next(now time.Time) (passed uint64, ok bool) {
	if r.spent.Before(now) {
		r.spent = now
	}
	if r.spent.Sub(now) >= refusalBurst*refusalEvery {
		r.passed++
		return 0, false
	}
	r.spent = r.spent.Add(refusalEvery)
	passed, r.passed = r.passed, 0
	return passed, true
}

// difference names the first thing in which two snapshots differ.
func difference(own, sent *mesh.Snapshot) string {
	rows := map[string]mesh.Rule{}
	for _, r := range own.Rules {
		rows[r.ID] = r
	}
	for _, r := range sent.Rules {
		signed, there := rows[r.ID]
		delete(rows, r.ID)
		switch {
		case !there:
			return fmt.Sprintf("row %q is not in it", r.ID)
		case !same(signed, r):
			return fmt.Sprintf("row %q is another one in it", r.ID)
		}
	}
	for _, r := range own.Rules {
		if _, left := rows[r.ID]; left {
			return fmt.Sprintf("row %q is missing", r.ID)
		}
	}
	for _, part := range []struct {
		name      string
		own, sent any
	}{
		{"services", own.Services, sent.Services}, {"groups", own.Memberships, sent.Memberships},
		{"destinations", own.Destinations, sent.Destinations}, {"routes", own.Routes, sent.Routes}, {"token issuers and API keys", own.Tokens, sent.Tokens},
		{"issuers of tokens that routes ask for", own.Shown, sent.Shown},
		{"modes", own.Modes, sent.Modes}, {"endpoints", own.Endpoints, sent.Endpoints}, {"shares", own.Shares, sent.Shares}, {"trust domain", own.TrustDomain, sent.TrustDomain},
	} {
		if !same(part.own, part.sent) {
			return "other " + part.name
		}
	}
	return "rows in another order"
}

// same compares as the hash of a snapshot does. Nouns hold nothing that JSON
// lacks.
func same(a, b any) bool {
	x, _ := json.Marshal(a)
	y, _ := json.Marshal(b)
	return bytes.Equal(x, y)
}
