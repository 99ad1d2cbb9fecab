package main

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"

	"sallyport/internal/control"
	"sallyport/internal/daemon"
	"sallyport/internal/mesh"
	"sallyport/internal/policyset"
)

// maxAhead is how far above what the signer knows an issuer may name the next
// revision: so many sets may others have pushed meanwhile. A proxy takes
// nothing lower than the highest that it took.
const maxAhead = 1000

// signers are the keys that sign a set.
type signers []ed25519.PrivateKey

func (k signers) sign(s *policyset.Signed) {
	for _, key := range k {
		s.Sign(key)
	}
}

// readSigners reads keys from their files.
func readSigners(files []string) (keys signers, err error) {
	for _, file := range files {
		k, err := readKey(file)
		if err != nil {
			return nil, usage(err)
		}
		keys = append(keys, k)
	}
	return keys, nil
}

// A signing is one command that makes a set of what an issuer says. Where keys
// sign, the issuer's word is held against the record of the signer: it may
// refuse and withhold, but not choose what gets signed.
type signing struct {
	st   mesh.IssuerStatus
	keys signers
	// rec is nil without keys.
	rec *record
	// td is the trust domain that the operator named, named what is in force as
	// he says, revision that of the set to make; each may be missing.
	td, named string
	revision  uint64
	// get fetches a set from the issuer.
	get func(ctx context.Context, revision uint64) ([]byte, error)
}

// check holds what the issuer says is in force against the record: it may be
// newer than what the signer knows, but not older or another.
func (g *signing) check() error {
	if g.named != "" {
		return g.isNamed()
	}
	if len(g.keys) == 0 {
		return nil
	}
	if known := g.rec.of(g.st.TrustDomain, inForce); len(known) > 0 {
		last := known[len(known)-1]
		if g.st.PolicyRevision < last.Revision || g.st.PolicyRevision == last.Revision && g.st.PolicySet != last.Hash {
			return failed(daemon.Hint(fmt.Errorf("the issuer says that %s is in force; here revision %d, set %s, was seen in force at %s: the issuer was set back, or lies",
				g.said(), last.Revision, last.Hash, last.Time.Format(time.RFC3339)), "look into it, and say with --in-force what is in force"))
		}
	}
	g.rec.saw(g.st.TrustDomain, g.st.PolicyRevision, g.st.PolicySet)
	return nil
}

// said is what the issuer says is in force.
func (g *signing) said() string {
	if g.st.PolicySet == "" {
		return fmt.Sprintf("revision %d, no set,", g.st.PolicyRevision)
	}
	return fmt.Sprintf("revision %d, set %s,", g.st.PolicyRevision, g.st.PolicySet)
}

// isNamed holds it against --in-force.
func (g *signing) isNamed() error {
	rev, err := strconv.ParseUint(g.named, 10, 64)
	switch {
	case g.named == "none" && g.st.PolicySet == "", g.named == g.st.PolicySet, err == nil && rev == g.st.PolicyRevision:
		return nil
	}
	return failed(fmt.Errorf("the issuer says that %s is in force, --in-force says %s", g.said(), g.named))
}

// checkNamed refuses a value of --in-force that names nothing.
func checkNamed(v string) error {
	if rev, err := strconv.ParseUint(v, 10, 64); v == "" || v == "none" || policyset.IsHash(v) || err == nil && rev > 0 {
		return nil
	}
	return usage(fmt.Errorf("--in-force %q: write the revision that is in force, the hash of its set, or none", v))
}

// vouched is check for a command that signs what is in force again: the signer
// has to know it. Since are the states of sets that it may not be older than.
func (g *signing) vouched(since ...recordedState) error {
	if err := g.check(); err != nil || len(g.keys) == 0 || g.named != "" && g.named == g.st.PolicySet {
		return err
	}
	td := g.st.TrustDomain
	known := slices.DeleteFunc(g.rec.of(td), func(s recordedSet) bool { return s.Revision != g.st.PolicyRevision })
	is := slices.ContainsFunc(known, func(s recordedSet) bool { return s.Hash == g.st.PolicySet })
	why := ""
	switch newest := g.rec.newest(td, since...); {
	case g.named != "" && (is || len(known) == 0): // by its revision
	case len(known) > 0 && !is:
		why = fmt.Sprintf("under that revision set %s was signed here", known[len(known)-1].Hash)
	case !is:
		why = "which was not signed here"
	case g.st.PolicyRevision < newest:
		why = fmt.Sprintf("and revision %d was pushed here since", newest)
	}
	if why == "" {
		return nil
	}
	return failed(daemon.Hint(fmt.Errorf("the issuer says that %s is in force, %s, so that what would be signed is the issuer's word alone", g.said(), why),
		"say what is in force with --in-force REVISION or HASH"))
}

// next is the revision of the set to make.
func (g *signing) next() (uint64, error) {
	next := nextRevision(g.st)
	if len(g.keys) == 0 {
		if g.revision > 0 {
			next = g.revision
		}
		return next, nil
	}
	last := g.rec.newest(g.st.TrustDomain)
	if g.revision > 0 {
		if g.revision <= last {
			// Whoever has both could show some proxies one and some the other.
			return 0, failed(fmt.Errorf("--revision %d: revision %d was signed here already; take a higher one", g.revision, last))
		}
		return g.revision, nil
	}
	known := last
	if rev, err := strconv.ParseUint(g.named, 10, 64); err == nil {
		known = max(known, rev)
	}
	if next = max(next, last+1); next > known+maxAhead {
		return 0, failed(daemon.Hint(fmt.Errorf("the issuer says that revision %d is the next; the last that is known here is %d, and proxies that took so high a one would take no lower one again", next, known),
			"if it is right, say so with --revision or --in-force"))
	}
	return next, nil
}

// again makes the set that follows on the one in force and says what an
// earlier one says. A hash, unless it is empty, is that of the earlier one.
func (g *signing) again(ctx context.Context, revision uint64, hash string, next uint64) (*policyset.Signed, error) {
	b, err := g.get(ctx, revision)
	if err != nil {
		return nil, err
	}
	old, err := policyset.Parse(b)
	switch {
	case err != nil:
		return nil, fmt.Errorf("the issuer sends no set: %w", err)
	case revision != 0 && old.Revision != revision:
		return nil, failed(fmt.Errorf("the issuer sends revision %d instead of %d", old.Revision, revision))
	case old.TrustDomain != g.st.TrustDomain:
		return nil, failed(fmt.Errorf("the issuer sends a set of %s, it serves %s", old.TrustDomain, g.st.TrustDomain))
	case hash != "" && old.Hash() != hash:
		return nil, failed(fmt.Errorf("the issuer sends set %s as revision %d, which is set %s", old.Hash(), old.Revision, hash))
	}
	for _, k := range g.keys {
		if pin := policyset.KeyOf(k.Public().(ed25519.PublicKey)); !slices.Contains(old.Keys(), pin) {
			return nil, failed(fmt.Errorf("revision %d is not signed by %s, so that what it says is the issuer's word alone: review the folder and push it", old.Revision, pin))
		}
	}
	if g.rec != nil && old.Revision == g.st.PolicyRevision && old.Hash() == g.st.PolicySet {
		g.rec.note(old, inForce)
	}
	set, err := policyset.New(policyset.Set{
		TrustDomain: old.TrustDomain, Revision: next, Previous: g.st.PolicySet,
		Created: time.Now().UTC().Truncate(time.Second), Files: old.Files,
	})
	if err != nil {
		return nil, failed(err)
	}
	return set, checkedSet(set)
}

// back makes the set that a canary group goes back by: it says what is in force.
func (g *signing) back(ctx context.Context, next *policyset.Signed) (*policyset.Signed, error) {
	if err := g.vouched(inForce, tried); err != nil {
		return nil, err
	}
	return g.again(ctx, g.st.PolicyRevision, g.st.PolicySet, next.Revision+1)
}

// earlier makes the set of a rollback to a revision; 0 is the one before that in
// force.
func (g *signing) earlier(ctx context.Context, revision uint64) (*policyset.Signed, error) {
	hash := ""
	if err := g.check(); err != nil {
		return nil, err
	}
	if len(g.keys) > 0 {
		if err := g.domain(); err != nil {
			return nil, err
		}
		if revision == 0 {
			var err error
			if revision, err = g.before(); err != nil {
				return nil, err
			}
		}
		hash = g.rec.hash(g.st.TrustDomain, revision)
	}
	next, err := g.next()
	if err != nil {
		return nil, err
	}
	return g.again(ctx, revision, hash, next)
}

// still makes the set of a rollback to what is in force for all others, while
// a canary group tries another.
func (g *signing) still(ctx context.Context) (*policyset.Signed, error) {
	if err := g.vouched(inForce); err != nil {
		return nil, err
	}
	if len(g.keys) > 0 {
		if err := g.domain(); err != nil {
			return nil, err
		}
	}
	next, err := g.next()
	if err != nil {
		return nil, err
	}
	return g.again(ctx, g.st.PolicyRevision, g.st.PolicySet, next)
}

// before is the revision that was in force before the one that is.
func (g *signing) before() (uint64, error) {
	if err := g.vouched(inForce); err != nil {
		return 0, err
	}
	all := slices.DeleteFunc(g.rec.of(g.st.TrustDomain, inForce), func(s recordedSet) bool { return s.Revision >= g.st.PolicyRevision })
	if len(all) == 0 {
		return 0, failed(daemon.Hint(errors.New("it is not known here what was in force before, so that what would be signed is the issuer's word alone"), "name it with: sallyport policy rollback REVISION"))
	}
	return all[len(all)-1].Revision, nil
}

// domain holds the trust domain of the issuer against what the signer knows:
// its keys may sign for others too.
func (g *signing) domain() error {
	switch {
	case g.td == g.st.TrustDomain.Name(), g.td == "" && g.rec.only(g.st.TrustDomain):
		return nil
	case g.td == "":
		return failed(daemon.Hint(fmt.Errorf("the issuer says that it serves %s, which is not the one trust domain that was signed for here", g.st.TrustDomain), "say so with --trust-domain"))
	}
	return failed(fmt.Errorf("the issuer serves %s, --trust-domain says %s", g.st.TrustDomain, g.td))
}

// sign signs what is pushed, the set to go back by beside it, and records that
// before anybody else has it.
func (g *signing) sign(set, back *policyset.Signed) error {
	if len(g.keys) == 0 {
		return nil
	}
	if err := g.signOne(set, signedOnly); err != nil {
		return err
	}
	if back != nil {
		if err := g.signOne(back, signedBack); err != nil {
			return err
		}
	}
	return failed(g.rec.save())
}

func (g *signing) signOne(s *policyset.Signed, state recordedState) error {
	if s.TrustDomain != g.st.TrustDomain {
		return failed(fmt.Errorf("the set is for %s, the issuer serves %s", s.TrustDomain, g.st.TrustDomain))
	}
	return g.rec.sign(s, g.keys, state)
}

// taken records that the issuer took a set.
func (g *signing) taken(set *policyset.Signed, state recordedState) error {
	if g.rec == nil {
		return nil
	}
	g.rec.note(set, state)
	if err := g.rec.save(); err != nil {
		return failed(fmt.Errorf("revision %d is pushed; that it is was not recorded: %w", set.Revision, err))
	}
	return nil
}

// begin makes a signing; its record is open until the caller closes it.
func (p *pusher) begin(ctx context.Context, a *control.Admin, keys signers) (*signing, error) {
	st, err := a.Status(ctx)
	if err != nil {
		return nil, err
	}
	g := &signing{st: st, keys: keys, td: *p.td, named: p.inForce, revision: p.revision, get: a.PolicySet}
	if len(keys) > 0 {
		g.rec, err = openRecord(p.record)
	}
	return g, err
}
