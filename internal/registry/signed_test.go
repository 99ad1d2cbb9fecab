package registry_test

import (
	"bytes"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"strings"
	"testing"

	"sallyport/internal/mesh"
	"sallyport/internal/policyset"
	"sallyport/internal/registry"
	"sallyport/internal/store"
)

// reviewer makes the key of somebody who signs.
func reviewer(n byte) ed25519.PrivateKey {
	return ed25519.NewKeyFromSeed(bytes.Repeat([]byte{n}, ed25519.SeedSize))
}

// pinned are the signers 1 and 2, both of whom must sign.
func pinned() policyset.Signers {
	var s policyset.Signers
	for n := byte(1); n <= 2; n++ {
		s.Keys = append(s.Keys, policyset.KeyOf(reviewer(n).Public().(ed25519.PublicKey)))
	}
	return s
}

func signed(s *policyset.Signed, by ...byte) *policyset.Signed {
	for _, n := range by {
		s.Sign(reviewer(n))
	}
	return s
}

// The records of the policies in force, and of the set of a revision.
const inForce = "current"

func setOf(revision int) string { return fmt.Sprintf("set/%020d", revision) }

// tamper writes to the store behind the back of the issuers.
func tamper(t *testing.T, s store.Store, key string, value []byte) {
	t.Helper()
	if _, err := s.Write(t.Context(), store.Op{Kind: store.KindPolicy, Key: key, Value: value}); err != nil {
		t.Fatal(err)
	}
}

// record is what an issuer writes of a set, with some fields changed.
func record(t *testing.T, s *policyset.Signed, change map[string]any) []byte {
	t.Helper()
	p, err := s.Policies()
	if err != nil {
		t.Fatal(err)
	}
	m := map[string]any{"revision": s.Revision, "hash": p.Hash(), "at": s.Created, "policies": json.RawMessage(p.Encode()), "set": s.Hash()}
	maps.Copy(m, change)
	b, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

const allowAll = "p, all, in, **, **, *, *, **, -, allow\n"

// TestUnsignedPoliciesAreNotLoaded starts an issuer that pins keys on a store to
// which somebody else has written.
func TestUnsignedPoliciesAreNotLoaded(t *testing.T) {
	first := signed(pushable(t, 1, "", "# first\n"), 1, 2)
	second := signed(pushable(t, 2, first.Hash(), "# second\n"), 1, 2)
	third := func(by ...byte) *policyset.Signed { return signed(pushable(t, 3, second.Hash(), allowAll), by...) }
	other := pushable(t, 2, first.Hash(), allowAll)
	for _, tt := range []struct {
		name   string
		tamper func(t *testing.T, s store.Store)
		want   string
	}{
		{"rows in the place of those of the set", func(t *testing.T, s store.Store) {
			p, _ := third().Policies()
			tamper(t, s, inForce, record(t, second, map[string]any{"policies": json.RawMessage(p.Encode()), "hash": p.Hash()}))
		}, ""},
		{"policies of no set", func(t *testing.T, s store.Store) {
			tamper(t, s, inForce, record(t, third(), map[string]any{"set": ""}))
		}, "do not come from a set"},
		{"a set that is not there", func(t *testing.T, s store.Store) { tamper(t, s, inForce, record(t, third(1, 2), nil)) }, "not found"},
		{"a set that nobody signed", func(t *testing.T, s store.Store) {
			tamper(t, s, setOf(3), third().Encode())
			tamper(t, s, inForce, record(t, third(), nil))
		}, "0 of the 2 pinned keys have signed, 2 must"},
		{"a set that one of two signed", func(t *testing.T, s store.Store) {
			tamper(t, s, setOf(3), third(1).Encode())
			tamper(t, s, inForce, record(t, third(), nil))
		}, "1 of the 2 pinned keys have signed, 2 must"},
		{"a set that others signed", func(t *testing.T, s store.Store) {
			tamper(t, s, setOf(3), third(1, 3, 4).Encode())
			tamper(t, s, inForce, record(t, third(), nil))
		}, "1 of the 2 pinned keys have signed, 2 must"},
		{"another set in its place", func(t *testing.T, s store.Store) { tamper(t, s, setOf(2), other.Encode()) }, "stands where set " + second.Hash()[:12] + " should"},
		{"an altered set", func(t *testing.T, s store.Store) {
			tamper(t, s, setOf(2), bytes.Replace(second.Encode(), []byte("# second"), []byte("# secnod"), 1))
		}, "stands where set"},
		{"a signed set under another revision", func(t *testing.T, s store.Store) {
			tamper(t, s, setOf(9), second.Encode())
			tamper(t, s, inForce, record(t, second, map[string]any{"revision": 9}))
		}, "of revision 2 stands where"},
		{"a damaged set", func(t *testing.T, s store.Store) { tamper(t, s, setOf(2), []byte("x")) }, "policy set: line 1"},
		{"a damaged record", func(t *testing.T, s store.Store) { tamper(t, s, inForce, []byte("x")) }, "invalid character"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var why error
			in := &issuer{t: t, path: t.TempDir() + "/s.sqlite", verify: pinned().Verify, unsigned: func(err error) { why = err }}
			in.restart()
			t.Cleanup(in.stop)
			for _, s := range []*policyset.Signed{first, second} {
				if err := in.PushPolicies(t.Context(), s); err != nil {
					t.Fatal(err)
				}
			}
			tt.tamper(t, in.store)
			in.restart()
			snap := in.Current()
			if tt.want == "" {
				if snap == nil || len(snap.Rules) != 0 || snap.PolicySet != second.Hash() || why != nil {
					t.Errorf("in force is %+v, and said is %v; want the second set", snap, why)
				}
				return
			}
			if snap != nil || in.Status().PolicyRevision != 0 {
				t.Errorf("in force is %+v, want nothing", in.Status())
			}
			if why == nil || !strings.Contains(why.Error(), tt.want) || in.LastRefusal() != why.Error() {
				t.Errorf("said is %v, the status says %q, want %q", why, in.LastRefusal(), tt.want)
			}
			// Who may push mends it.
			mended := signed(pushable(t, 10, "", "# mended\n"), 1, 2)
			if err := in.PushPolicies(t.Context(), mended); err != nil {
				t.Fatalf("a push afterwards: %v", err)
			}
			why = nil
			in.restart()
			if st := in.Status(); st.PolicySet != mended.Hash() || why != nil || st.LastRefusal != "" {
				t.Errorf("after a push and a restart in force is %+v, and said is %v", st, why)
			}
		})
	}
}

// TestAStoreThatWasSetBack gives an issuer, and one that starts on it, what was
// signed and never came through a push.
func TestAStoreThatWasSetBack(t *testing.T) {
	first := signed(pushable(t, 1, "", "# first\n"), 1, 2)
	second := signed(pushable(t, 2, first.Hash(), "# second\n"), 1, 2)
	deny := "p, a, in, **, **, *, *, **, -, deny\n"
	red := signed(pushable(t, 9, second.Hash(), deny), 1, 2)
	stale := signed(pushable(t, 9, first.Hash(), "# stale\n"), 1, 2)
	for _, tt := range []struct {
		name          string
		set           *policyset.Signed
		running, anew string // what is said; "" when it is in force
	}{
		{"the first set", first, "is no newer than that of revision 2 in force", "revision 2 was in force at this issuer: the store was set back"},
		{"a set whose tests are red", red, "a red case", "a red case"},
		{"a set that follows on an older one", stale, "revision 2 was in force since", ""},
		{"the set that is in force", second, "", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var why error
			in := &issuer{t: t, path: t.TempDir() + "/s.sqlite", verify: pinned().Verify, unsigned: func(err error) { why = err },
				check: func(p *mesh.Policies) error {
					if len(p.Rules) > 0 {
						return errors.New("a red case")
					}
					return nil
				}}
			in.restart()
			t.Cleanup(in.stop)
			for _, s := range []*policyset.Signed{first, second} {
				if err := in.PushPolicies(t.Context(), s); err != nil {
					t.Fatal(err)
				}
			}
			tamper(t, in.store, setOf(int(tt.set.Revision)), tt.set.Encode())
			tamper(t, in.store, inForce, record(t, tt.set, nil))
			// The conflict of a push makes it look.
			_ = in.PushPolicies(t.Context(), signed(pushable(t, 3, second.Hash(), "# third\n"), 1, 2))
			if said(why) != tt.running && !strings.Contains(said(why), tt.running) {
				t.Errorf("while it runs: %v, want %q", why, tt.running)
			}
			in.floor = registry.Floor{Revision: 2, Set: second.Hash()}
			tamper(t, in.store, setOf(int(tt.set.Revision)), tt.set.Encode())
			tamper(t, in.store, inForce, record(t, tt.set, nil))
			why = nil
			in.restart()
			st := in.Status()
			if !strings.Contains(said(why), tt.anew) || (tt.anew == "") != (st.PolicySet == tt.set.Hash()) {
				t.Errorf("after a start: %v, in force is %+v; want %q", why, st, tt.anew)
			}
			if st.NextRevision <= 2 {
				t.Errorf("the next revision is %d, and 2 was in force", st.NextRevision)
			}
			// Who may push mends it, above what was in force.
			if tt.anew != "" {
				if err := in.PushPolicies(t.Context(), signed(pushable(t, 2, "", "# mended\n"), 1, 2)); !errors.Is(err, registry.ErrStale) {
					t.Errorf("a push that is not above it: %v", err)
				}
				if err := in.PushPolicies(t.Context(), signed(pushable(t, st.NextRevision, "", "# mended\n"), 1, 2)); err != nil {
					t.Errorf("a push afterwards: %v", err)
				}
				if in.floor.Revision != st.NextRevision {
					t.Errorf("the floor is %+v", in.floor)
				}
			}
		})
	}
}

func said(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

func TestPushUnsigned(t *testing.T) {
	in := &issuer{t: t, path: t.TempDir() + "/s.sqlite", verify: pinned().Verify}
	in.restart()
	t.Cleanup(in.stop)
	err := in.PushPolicies(t.Context(), signed(pushable(t, 1, "", "# first\n"), 1))
	if !errors.Is(err, registry.ErrUnfit) || !strings.Contains(err.Error(), "1 of the 2 pinned keys have signed, 2 must") {
		t.Errorf("a set with one signature: %v", err)
	}
	if _, err := in.ApplyPolicies(t.Context(), policies("pay")); err == nil || in.Current() != nil {
		t.Errorf("policies from files: %v", err)
	}
}

func TestPolicySetFile(t *testing.T) {
	in := &issuer{t: t, path: t.TempDir() + "/s.sqlite", verify: pinned().Verify}
	in.restart()
	t.Cleanup(in.stop)
	var all []*policyset.Signed
	for n, last := uint64(1), ""; n <= 4; n++ {
		s := signed(pushable(t, n, last, fmt.Sprintf("# %d\n", n)), 1, 2)
		if err := in.PushPolicies(t.Context(), s); err != nil {
			t.Fatal(err)
		}
		all, last = append(all, s), s.Hash()
	}
	for i, s := range all {
		b, err := in.PolicySetFile(s.Hash())
		if i == 0 && !errors.Is(err, mesh.ErrNotFound) || i > 0 && !bytes.Equal(b, s.Encode()) {
			t.Errorf("set %d: %d bytes, %v", s.Revision, len(b), err)
		}
	}
	in.restart()
	if b, err := in.PolicySetFile(all[3].Hash()); err != nil || !bytes.Equal(b, all[3].Encode()) {
		t.Errorf("after a restart: %v", err)
	}
	// Without pins nobody vouches for what would be given out.
	in.verify = nil
	in.restart()
	if _, err := in.PolicySetFile(all[3].Hash()); !errors.Is(err, mesh.ErrNotFound) || in.Current().PolicySet != "" {
		t.Errorf("without pins: %v, %q", err, in.Current().PolicySet)
	}
}

func sharedUnsigned(f *fleet) {
	f.verify = pinned().Verify
	a, b := f.join("a", true), f.join("b", true)
	first := signed(pushable(f.t, 1, "", "# first\n"), 1, 2)
	second := signed(pushable(f.t, 2, first.Hash(), "# second\n"), 1, 2)
	for _, s := range []*policyset.Signed{first, second} {
		if err := a.PushPolicies(f.t.Context(), s); err != nil {
			f.t.Fatal(err)
		}
	}
	f.eventually("b has the set of a", func() bool { return b.Status().PolicySet == second.Hash() })
	if b.Current().PolicySet != second.Hash() {
		f.t.Errorf("b distributes %q", b.Current().PolicySet)
	}

	// An older set, as it was signed, and rows that nobody signed.
	tamper(f.t, a.store, inForce, record(f.t, first, nil))
	f.eventually("both pass over an older set", func() bool {
		return strings.Contains(a.LastRefusal(), "is no newer than") && strings.Contains(b.LastRefusal(), "is no newer than")
	})
	injected := pushable(f.t, 7, second.Hash(), allowAll)
	tamper(f.t, a.store, setOf(7), injected.Encode())
	tamper(f.t, a.store, inForce, record(f.t, injected, nil))
	f.eventually("both pass over what nobody signed", func() bool {
		return strings.Contains(a.LastRefusal(), "0 of the 2") && strings.Contains(b.LastRefusal(), "0 of the 2")
	})
	for _, m := range []*member{a, b} {
		if st := m.Status(); st.PolicySet != second.Hash() || len(m.Current().Rules) != 0 {
			f.t.Errorf("in force is %+v", st)
		}
	}

	// The next push follows on what is in force, and takes its place.
	third := signed(pushable(f.t, 3, second.Hash(), "# third\n"), 1, 2)
	if err := b.PushPolicies(f.t.Context(), third); err != nil {
		f.t.Fatal(err)
	}
	f.eventually("a has the set of b", func() bool { return a.Status().PolicySet == third.Hash() && a.LastRefusal() == "" })
}
