package main

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/mesh"
	"sallyport/internal/policyset"
)

func seeded(n byte) ed25519.PrivateKey {
	return ed25519.NewKeyFromSeed(bytes.Repeat([]byte{n}, ed25519.SeedSize))
}

// pushedSet is a set that key 1 signed.
func pushedSet(t *testing.T, td spiffeid.TrustDomain, revision uint64, rows string) *policyset.Signed {
	t.Helper()
	s, err := policyset.New(policyset.Set{
		TrustDomain: td, Revision: revision, Created: time.Unix(1_800_000_000, 0).UTC(),
		Files: []policyset.File{{Name: "access.csv", Data: []byte(rows)}},
	})
	if err != nil {
		t.Fatal(err)
	}
	s.Sign(seeded(1))
	return s
}

// TestASignerDoesNotBelieveTheIssuer lets an issuer that lies say what is in
// force to a signer who pushed revisions 1, 2 and 3, signed 4, which was
// refused, tried 5 with 6 to go back by, and has seen 3 in force.
func TestASignerDoesNotBelieveTheIssuer(t *testing.T) {
	t.Parallel()
	other := spiffeid.RequireTrustDomainFromString("other.example")
	sets := map[uint64]*policyset.Signed{}
	for rev := range uint64(9) {
		sets[rev+1] = pushedSet(t, corp, rev+1, fmt.Sprintf("# revision %d\n", rev+1))
	}
	foreign := pushedSet(t, other, 3, "# elsewhere\n")
	forged := pushedSet(t, corp, 3, "# forged\n")
	unsigned := pushedSet(t, corp, 7, "# unsigned\n")
	unsigned, err := policyset.New(unsigned.Set)
	if err != nil {
		t.Fatal(err)
	}
	at := func(s *policyset.Signed) mesh.IssuerStatus {
		return mesh.IssuerStatus{TrustDomain: s.TrustDomain, PolicyRevision: s.Revision, PolicySet: s.Hash(), NextRevision: 7}
	}
	rolling := at(sets[3])
	rolling.Rollout = &mesh.Rollout{Revision: 5, State: mesh.Held}
	huge := at(sets[3])
	huge.NextRevision = 1 << 40
	for _, tt := range []struct {
		name string
		st   mesh.IssuerStatus
		// does is "push", "back" (the fallback of a canary group), "rollback", "to N",
		// or "still" (the rollback of what is held).
		does, named string
		revision    uint64
		// gives is what the issuer sends for the set that is asked for.
		gives *policyset.Signed
		// says is which set is signed again, or next for a push; "" with a refusal.
		says, refused string
	}{
		{name: "the truth", st: at(sets[5]), does: "back", gives: sets[5], says: "revision 5"},
		{name: "a fallback in force", st: at(sets[6]), does: "back", gives: sets[6], says: "revision 6"},
		{name: "an older set of the same keys", st: at(sets[2]), does: "back", gives: sets[2], refused: "here revision 3, set " + sets[3].Hash()},
		{name: "the set before the one that was tried", st: at(sets[3]), does: "back", gives: sets[3], refused: "revision 5 was pushed here since"},
		{name: "a newer set that was not signed here", st: at(sets[8]), does: "back", gives: sets[8], refused: "which was not signed here"},
		{name: "a newer set, named by its hash", st: at(sets[8]), does: "back", named: sets[8].Hash(), gives: sets[8], says: "revision 8"},
		{name: "a newer set, named by its revision", st: at(sets[8]), does: "back", named: "8", gives: sets[8], says: "revision 8"},
		{name: "another than the named revision", st: at(sets[8]), does: "back", named: "9", gives: sets[8], refused: "--in-force says 9"},
		{name: "another than the named hash", st: at(sets[8]), does: "back", named: sets[9].Hash(), gives: sets[8], refused: "--in-force says " + sets[9].Hash()},
		{name: "none named, and there is one", st: at(sets[5]), does: "push", named: "none", refused: "--in-force says none"},
		{name: "another set of the named revision", st: at(forged), does: "back", named: "3", gives: forged, refused: "under that revision set " + sets[3].Hash()},
		{name: "bytes of an older set", st: at(sets[5]), does: "back", gives: sets[2], refused: "sends revision 2 instead of 5"},
		{name: "bytes of another set of the revision", st: at(sets[3]), does: "to 3", gives: forged, refused: "which is set " + sets[3].Hash()},
		{name: "a set that nobody signed", st: at(unsigned), does: "back", named: "7", gives: unsigned, refused: "is not signed by"},
		{name: "a set of another trust domain", st: at(sets[5]), does: "to 3", gives: foreign, refused: "sends a set of other.example"},
		{name: "another trust domain", st: at(foreign), does: "rollback", gives: foreign, refused: "not the one trust domain"},
		{name: "back to what was before", st: at(sets[5]), does: "rollback", gives: sets[3], says: "revision 3"},
		{name: "back to what the issuer says was before", st: at(sets[5]), does: "rollback", gives: sets[2], refused: "sends revision 2 instead of 3"},
		{name: "back from what is not known", st: at(sets[8]), does: "rollback", gives: sets[2], refused: "which was not signed here"},
		{name: "back from no set at all", st: mesh.IssuerStatus{TrustDomain: corp, PolicyRevision: 9, NextRevision: 10}, does: "rollback", gives: sets[3], refused: "no set, is in force, which was not signed here"},
		{name: "no set that others stayed on", st: mesh.IssuerStatus{TrustDomain: corp, PolicyRevision: 9, NextRevision: 10}, does: "still", gives: sets[9], refused: "which was not signed here"},
		{name: "back to a revision by its number", st: at(sets[5]), does: "to 2", gives: sets[2], says: "revision 2"},
		{name: "back to a revision that is not known", st: at(sets[8]), does: "to 7", gives: sets[7], says: "revision 7"},
		{name: "what others stayed on", st: rolling, does: "still", gives: sets[3], says: "revision 3"},
		{name: "what others stayed on, older", st: at(sets[1]), does: "still", gives: sets[1], refused: "set back, or lies"},
		{name: "a push onto what was set back", st: at(sets[1]), does: "push", refused: "set back, or lies"},
		{name: "a push onto another set", st: at(forged), does: "push", refused: "set back, or lies"},
		{name: "a push onto what was set back, named", st: at(sets[1]), does: "push", named: "1", says: "7"},
		{name: "a push onto a newer set", st: at(sets[9]), does: "push", says: "7"},
		{name: "a huge revision", st: huge, does: "push", refused: "revision 1099511627776 is the next; the last that is known here is 6"},
		{name: "a huge revision that the operator wants", st: huge, does: "push", revision: 1 << 40, says: "1099511627776"},
		{name: "a huge rollback", st: huge, does: "to 2", gives: sets[2], refused: "is the next"},
		{name: "a revision that was signed before", st: at(sets[5]), does: "push", revision: 6, refused: "revision 6 was signed here already"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "signed.json")
			rec := opened(t, file)
			for rev, state := range []recordedState{inForce, inForce, inForce, signedOnly, tried, signedBack} {
				rec.note(sets[uint64(rev)+1], state)
			}
			if err := rec.save(); err != nil {
				t.Fatal(err)
			}
			rec.Close()
			g := &signing{st: tt.st, keys: signers{seeded(1)}, rec: opened(t, file), named: tt.named, revision: tt.revision,
				get: func(context.Context, uint64) ([]byte, error) { return tt.gives.Encode(), nil }}
			defer g.rec.Close()
			said, err := does(t.Context(), g, tt.does)
			switch {
			case tt.refused != "" && (err == nil || !strings.Contains(err.Error(), tt.refused)):
				t.Errorf("signs %q, error %v, want %q", said, err, tt.refused)
			case tt.refused == "" && err != nil:
				t.Errorf("refused: %v", err)
			case said != tt.says:
				t.Errorf("signs %q, want %q", said, tt.says)
			}
		})
	}
}

// does makes a set, and returns what it says, or for a push its revision.
func does(ctx context.Context, g *signing, what string) (string, error) {
	var s *policyset.Signed
	var err error
	switch what {
	case "push":
		if err := g.check(); err != nil {
			return "", err
		}
		next, err := g.next()
		if err != nil {
			return "", err
		}
		return fmt.Sprint(next), nil
	case "back":
		s, err = g.back(ctx, &policyset.Signed{Set: policyset.Set{Revision: 11}})
	case "rollback":
		s, err = g.earlier(ctx, 0)
	case "still":
		s, err = g.still(ctx)
	default:
		var revision uint64
		if _, err := fmt.Sscanf(what, "to %d", &revision); err != nil {
			return "", err
		}
		s, err = g.earlier(ctx, revision)
	}
	if err != nil {
		return "", err
	}
	return strings.TrimPrefix(strings.TrimSpace(string(s.Files[0].Data)), "# "), nil
}

func opened(t *testing.T, file string) *record {
	t.Helper()
	r, err := openRecord(file)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// TestWhatIsSignedIsRecordedFirst looks at the file between the signature and
// the push, and at who else may sign meanwhile.
func TestWhatIsSignedIsRecordedFirst(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "state", "signed.json")
	first, back := pushedSet(t, corp, 1, "# first\n"), pushedSet(t, corp, 2, "# back\n")
	g := &signing{st: mesh.IssuerStatus{TrustDomain: corp}, keys: signers{seeded(2)}, rec: opened(t, file)}
	if _, err := openRecord(file); err == nil || !strings.Contains(err.Error(), "another sallyport signs with the record") {
		t.Errorf("a second signer: %v", err)
	}
	if err := g.sign(first, back); err != nil {
		t.Fatal(err)
	}
	if len(first.Keys()) != 2 || len(back.Keys()) != 2 {
		t.Errorf("signed by %v and %v", first.Keys(), back.Keys())
	}
	info, err := os.Stat(file)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the record: %v, %v", info, err)
	}
	g.rec.Close()
	for _, want := range []struct {
		state    recordedState
		revision uint64
	}{{signedOnly, 1}, {signedBack, 2}, {inForce, 0}} {
		rec := opened(t, file)
		if got := rec.newest(corp, want.state); got != want.revision {
			t.Errorf("the newest that is %s is %d, want %d", want.state, got, want.revision)
		}
		rec.Close()
	}
	g.rec = opened(t, file)
	if err := g.taken(first, inForce); err != nil {
		t.Fatal(err)
	}
	g.rec.Close()
	rec := opened(t, file)
	defer rec.Close()
	if got := rec.newest(corp, inForce); got != 1 {
		t.Errorf("the newest in force is %d", got)
	}
	if err := (&signing{st: g.st, keys: g.keys, rec: rec}).sign(pushedSet(t, corp, 2, "# other\n"), nil); err == nil || !strings.Contains(err.Error(), "signed here already, as set "+back.Hash()) {
		t.Errorf("two sets of one revision: %v", err)
	}
	if err := (&signing{st: mesh.IssuerStatus{TrustDomain: spiffeid.RequireTrustDomainFromString("other.example")}, keys: g.keys, rec: rec}).sign(first, nil); err == nil {
		t.Error("a set is signed for an issuer of another trust domain")
	}
}

// TestARecordThatIsNoGood refuses what somebody else may have written.
func TestARecordThatIsNoGood(t *testing.T) {
	t.Parallel()
	good := `{"sets": [{"trust_domain": "corp.example", "revision": 1, "hash": "` + strings.Repeat("a", 64) + `", "state": "in force", "time": "2026-11-27T00:00:00Z"}]}`
	for _, tt := range []struct {
		name, text string
		mode       os.FileMode
		want       string
	}{
		{"one that is good", good, 0o600, ""},
		{"one that others may read", good, 0o640, "chmod 600"},
		{"one that is damaged", good[:40], 0o600, "unexpected EOF"},
		{"two in one", good + good, 0o600, "something follows"},
		{"a field that is not known", strings.Replace(good, `"time"`, `"times"`, 1), 0o600, "unknown field"},
		{"a revision that is none", strings.Replace(good, `: 1,`, `: 0,`, 1), 0o600, "sets[0]"},
		{"a hash that is none", strings.Replace(good, `aaa`, `AAA`, 1), 0o600, "sets[0]"},
		{"a state that is none", strings.Replace(good, `in force`, `forced`, 1), 0o600, "sets[0]"},
		{"no trust domain", strings.Replace(good, `corp.example`, ``, 1), 0o600, "sets[0]"},
		{"a large one", strings.Repeat(" ", maxRecord) + good, 0o600, "bytes"},
	} {
		file := filepath.Join(t.TempDir(), "signed.json")
		if err := os.WriteFile(file, []byte(tt.text), tt.mode); err != nil {
			t.Fatal(err)
		}
		r, err := openRecord(file)
		if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.want)
		}
		if err == nil {
			r.Close()
		}
	}
	dir := t.TempDir()
	link := filepath.Join(dir, "signed.json")
	if err := os.Symlink("elsewhere", link); err != nil {
		t.Fatal(err)
	}
	if _, err := openRecord(link); err == nil {
		t.Error("a link is followed")
	}
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	if _, err := openRecord(filepath.Join(dir, "new.json")); err == nil || !strings.Contains(err.Error(), "may be written by others") {
		t.Errorf("a directory that others may write: %v", err)
	}
}

// TestARecordIsBounded forgets the oldest sets of a trust domain, not those of
// another.
func TestARecordIsBounded(t *testing.T) {
	t.Parallel()
	rec := opened(t, filepath.Join(t.TempDir(), "signed.json"))
	defer rec.Close()
	other := spiffeid.RequireTrustDomainFromString("other.example")
	rec.note(pushedSet(t, other, 1, "# elsewhere\n"), inForce)
	for rev := range uint64(keepRecorded + 5) {
		rec.note(pushedSet(t, corp, rev+1, "# here\n"), inForce)
	}
	if all := rec.of(corp); len(all) != keepRecorded || all[0].Revision != 6 || rec.newest(other) != 1 || rec.only(corp) {
		t.Errorf("%d sets from %d on, elsewhere %d", len(all), all[0].Revision, rec.newest(other))
	}
	if err := rec.save(); err != nil {
		t.Fatal(err)
	}
}
