package registry_test

import (
	"context"
	"errors"
	"path/filepath"
	"testing"
	"time"

	"sallyport/internal/mesh"
	"sallyport/internal/store"
)

// A listened store says when a kind of records was listed.
type listened struct {
	store.Store
	listed func(store.Kind)
}

func (l *listened) List(ctx context.Context, k store.Kind, after string, limit int) ([]store.Record, error) {
	out, err := l.Store.List(ctx, k, after, limit)
	if l.listed != nil {
		l.listed(k)
	}
	return out, err
}

// late is a fleet on one store with two entries that were made by calls, of which
// one ends soon. The second issuer is not run, and listens to its store.
func late(t *testing.T) (f *fleet, a, b *member, heard *listened, e mesh.Entry) {
	t.Helper()
	var one store.Store
	f = &fleet{t: t, open: func(now func() time.Time) store.Store {
		if one == nil {
			s, err := store.SQLiteConfig{Path: filepath.Join(t.TempDir(), "issuers.db"), Now: now}.Open(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { s.Close() })
			one = s
		}
		heard = &listened{Store: one}
		return heard
	}}
	a = f.join("a", true)
	if _, err := a.ApplyPolicies(t.Context(), policies("pay")); err != nil {
		t.Fatal(err)
	}
	attested(t, a, "node-j")
	brief := entryOf("brief", "/ns/shop/sa/brief", "node-j", "unix:uid:6")
	brief.ExpiresAt = f.now().Add(time.Hour)
	made, err := a.EditEntries(t.Context(), []mesh.EntryEdit{create(entryOf("job", "/ns/shop/sa/job", "node-j", "unix:uid:5")), create(brief)})
	if err != nil || errors.Join(made[0].Err, made[1].Err) != nil {
		t.Fatal(made, err)
	}
	b = f.join("b", false)
	return f, a, b, heard, made[0].Entry
}

// remove has an issuer delete an entry.
func (m *member) remove(t *testing.T, e mesh.Entry) error {
	t.Helper()
	out, err := m.EditEntries(t.Context(), []mesh.EntryEdit{{ID: e.ID, Delete: true}})
	if err != nil {
		t.Error(err)
		return nil
	}
	return out[0].Err
}

// An issuer that is revoking for one entry finds that another one was deleted
// elsewhere, for which it has signed since it read what was issued.
func TestWhatIsSignedWhileAnotherIssuerDeletesIsRevoked(t *testing.T) {
	f, a, b, heard, e := late(t)
	f.ahead.Add(int64(2 * time.Hour))
	f.eventually("a ended brief", func() bool { return a.log.says("entry ended") })
	signed := false
	heard.listed = func(k store.Kind) {
		if k != store.KindIssued || signed {
			return
		}
		signed = true
		if err := a.remove(t, e); err != nil {
			t.Error(err)
		}
		if err := b.RecordIssued(t.Context(), []mesh.Issued{{Serial: "c1", ID: e.SPIFFEID, Entry: e.ID, Agent: agent("node-j"), Until: f.now().Add(time.Hour)}}); err != nil {
			t.Error(err)
		}
		if len(b.EntriesFor(agent("node-j"))) == 0 {
			t.Error("the issuer knows already that the entry is gone")
		}
	}
	f.run(b)
	f.eventually("what b has signed is revoked", func() bool { return revoked(a.Revocations()) != "" && revoked(b.Revocations()) != "" })
}

// An edit that comes too late has its issuer see what was done in its place.
func TestAnEditThatAnotherIssuerHasMadeIsFollowed(t *testing.T) {
	_, a, b, _, e := late(t)
	if err := a.remove(t, e); err != nil {
		t.Fatal(err)
	}
	if err := b.remove(t, e); !errors.Is(err, mesh.ErrNotFound) {
		t.Errorf("deleted twice: %v", err)
	}
	if n, want := len(b.EntriesFor(agent("node-j"))), len(a.EntriesFor(agent("node-j"))); n != want {
		t.Errorf("the second issuer has %d entries, the first %d", n, want)
	}
}
