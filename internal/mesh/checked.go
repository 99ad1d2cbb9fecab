package mesh

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
)

// A Checked set is the proof that a reviewed set is valid, with its hash: what
// costs most is done once for all who need it. Only Check makes one.
type Checked struct {
	policies *Policies
	hash     string
	// entries is the hash of the entries, in one place for all sets that were
	// found to have the same.
	entries *[sha256.Size]byte
}

// Check validates a reviewed set, which is given away: it must not change any
// more. Entries that are those of before, which may be nil, are not looked at
// again: they may be thousands where an edit is of one row.
func Check(p *Policies, before *Checked) (*Checked, error) {
	known := before != nil && p.TrustDomain == before.policies.TrustDomain && slices.EqualFunc(p.Entries, before.policies.Entries, sameEntry)
	if err := (&validator{p: p, knownEntries: known}).run().orNil(); err != nil {
		return nil, err
	}
	c := &Checked{policies: p}
	if known {
		c.entries = before.entries
	} else {
		sum := hashEntries(p.Entries)
		c.entries = &sum
	}
	c.hash = p.hash(*c.entries)
	return c, nil
}

// Policies is the set that was checked. The caller must not change it.
func (c *Checked) Policies() *Policies { return c.policies }

// Hash is that of the set.
func (c *Checked) Hash() string { return c.hash }

// SameEntries reports whether the entries were found to be those of another
// set, in the same order, when one was checked after the other.
func (c *Checked) SameEntries(other *Checked) bool {
	return other != nil && c.entries == other.entries
}

// Compile makes the snapshot of everything: the set and where its services are
// at the moment. Endpoints of services that the set does not name are left out.
func (c *Checked) Compile(rev, policyRev uint64, eps []Endpoint) *Snapshot {
	p := c.policies
	s := &Snapshot{
		Revision: rev, PolicyRevision: policyRev, PolicyHash: c.hash,
		TrustDomain: p.TrustDomain,
		Services:    slices.Clone(p.Services), Rules: slices.Clone(p.Rules),
		Memberships: slices.Clone(p.Memberships), Destinations: slices.Clone(p.Destinations),
		Routes: slices.Clone(p.Routes), Tokens: p.Tokens, Modes: slices.Clone(p.Modes),
	}
	for _, e := range eps {
		if _, ok := s.Service(e.Service); ok {
			s.Endpoints = append(s.Endpoints, e)
		}
	}
	s.canonical()
	s.Candidate = p.tried(s)
	return s
}

// Compile checks a set and compiles it.
func Compile(p *Policies, rev, policyRev uint64, eps []Endpoint) (*Snapshot, error) {
	c, err := Check(p, nil)
	if err != nil {
		return nil, fmt.Errorf("compile policies: %w", err)
	}
	return c.Compile(rev, policyRev, eps), nil
}

// Hash is the SHA-256, in hex, of what the reviewed set says. Comments, blanks,
// the order of rows and, when every file is enforced, the file a row stands in
// do not change it.
func (p *Policies) Hash() string { return p.hash(hashEntries(p.Entries)) }

// hash is Hash; the entries come into it by a hash of their own.
func (p *Policies) hash(entries [sha256.Size]byte) string {
	c := Policies{
		TrustDomain:  p.TrustDomain,
		Services:     sorted(without(p.Services, func(s *Service) { s.Origin = Origin{} }), compareServices),
		Rules:        p.plainRules(p.Rules),
		Memberships:  plainMemberships(p.Memberships),
		Destinations: sorted(without(p.Destinations, func(d *Destination) { d.Origin = Origin{} }), compareDestinations),
		Cases:        sorted(without(p.Cases, func(c *Case) { c.Origin = Origin{} }), compareCases),
		Admin:        sorted(without(p.Admin, func(r *AdminRule) { r.Origin = Origin{} }), compareAdmin),
		Routes:       plainRoutes(p.Routes),
		Tokens:       p.Tokens.withoutOrigins(),
		Modes:        withoutOrigins(p.Modes),

		Candidate: p.Candidate.withoutOrigins(p),
	}
	return hashJSON(struct {
		Policies
		Entries string `json:"entries"`
	}{c, hex.EncodeToString(entries[:])})
}

// hashEntries hashes what entries say.
func hashEntries(list []Entry) [sha256.Size]byte {
	plain := sorted(without(list, func(e *Entry) { e.Origin = Origin{} }), compareEntries)
	return sha256.Sum256(mustJSON(plain))
}

// sameEntry compares everything, where it is written too.
func sameEntry(a, b Entry) bool { return a.Origin == b.Origin && a.Says(b) }
