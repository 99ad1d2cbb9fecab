package control

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"sallyport/internal/control/meshpb"
	"sallyport/internal/mesh"
)

// revocation is one that an issuer knows.
func revocation(n int, left time.Duration) mesh.RevokedSVID {
	return mesh.RevokedSVID{
		Serial: fmt.Sprintf("%x", n), ID: payment, Why: mesh.WhyRevoked, Revision: uint64(n), At: time.Now(),
		Until: time.Now().Add(left).Truncate(time.Second).UTC(),
	}
}

func (r *rig) revoke(list ...mesh.RevokedSVID) {
	r.reg.change(func() {
		r.reg.revoked = &mesh.RevokedSVIDs{Revision: list[len(list)-1].Revision, All: list}
	})
}

func serials(list []mesh.RevokedSVID) string {
	var out []string
	for _, r := range list {
		out = append(out, r.Serial)
	}
	return strings.Join(out, ",")
}

func TestRevocationsArePushedAndConfirmed(t *testing.T) {
	r := newRig(t, newCA(t, td))
	dead, one, two := revocation(8, -time.Minute), revocation(10, time.Hour), revocation(11, time.Hour)
	r.revoke(dead, one)
	c, _ := r.joined("node-b")
	w := newWatcher()
	w.revoked = make(chan []mesh.RevokedSVID, 64)
	subscribe(t, c, billingHello(), w)
	got := recv(t, "what is in force", w.revoked)
	want := []mesh.RevokedSVID{{Serial: "a", Until: one.Until, Why: one.Why}}
	if d := cmp.Diff(want, got, cmpopts.EquateComparable(spiffeid.ID{})); d != "" {
		t.Errorf("a new proxy is told (-want +got):\n%s", d)
	}
	report(t, r, "that it is confirmed", func(p mesh.Proxy) bool { return p.Revoked == 10 })
	r.revoke(dead, one, two)
	if got := serials(recv(t, "the news", w.revoked)); got != "b" {
		t.Errorf("then it is told %q, want the new one alone", got)
	}
	report(t, r, "that it is confirmed", func(p mesh.Proxy) bool { return p.Revoked == 11 && p.PolicyRevision == 3 })
	p, err := r.admin().Proxies(t.Context())
	if err != nil || len(p) != 1 || p[0].Revoked != 11 {
		t.Errorf("the operator sees %+v, %v", p, err)
	}
}

func TestManyRevocationsComeInPages(t *testing.T) {
	r := newRig(t, newCA(t, td))
	var all []mesh.RevokedSVID
	for n := range 2*revokedPage + 1 {
		all = append(all, revocation(n+1, time.Hour))
	}
	r.revoke(all...)
	c, _ := r.joined("node-b")
	w := newWatcher()
	w.revoked = make(chan []mesh.RevokedSVID, 64)
	subscribe(t, c, billingHello(), w)
	for n := 0; n < len(all); {
		n += len(recv(t, "a page", w.revoked))
	}
	report(t, r, "that all are confirmed", func(p mesh.Proxy) bool { return p.Revoked == uint64(len(all)) })
}

func TestWhatIsNotUnderstoodIsNotConfirmed(t *testing.T) {
	w := newWatcher()
	w.revoked = make(chan []mesh.RevokedSVID, 64)
	s := &subscriberState{handler: w}
	good := &meshpb.Revoked{Serial: "a", Until: timeToWire(time.Unix(4e9, 0)), Why: mesh.WhyBanned}
	bad := &meshpb.Revoked{Serial: "xyz", Until: good.Until, Why: good.Why}
	if err := s.distrust(t.Context(), &meshpb.Revocations{Revision: 5, Revoked: []*meshpb.Revoked{bad, good, nil}}); err == nil {
		t.Error("no error says that something was not understood")
	}
	if got := serials(<-w.revoked); got != "a" {
		t.Errorf("in force is %q, want what was understood", got)
	}
	if err := s.distrust(t.Context(), &meshpb.Revocations{Revision: 6, Revoked: []*meshpb.Revoked{good}}); err != nil || s.revoked != 0 {
		t.Errorf("confirmed up to %d, %v; want nothing on this stream", s.revoked, err)
	}
	s.greeting()
	if err := s.distrust(t.Context(), &meshpb.Revocations{Revision: 7}); err != nil || s.revoked != 7 {
		t.Errorf("a new stream confirms %d, %v; want 7", s.revoked, err)
	}
}

func TestWhatIsGivenOutIsRecorded(t *testing.T) {
	r := newRig(t, newCA(t, td))
	c, h := r.joined("node-a")
	if _, err := c.Renew(t.Context(), newKey(t)); err != nil {
		t.Fatal(err)
	}
	res, err := c.NewX509SVIDs(t.Context(), []SVIDRequest{{EntryID: "e-pay", ID: payment, Key: newKey(t)}, {EntryID: "e-no", ID: payment, Key: newKey(t)}})
	if err != nil || res[0].Err != nil || res[1].Err == nil {
		t.Fatalf("%+v, %v", res, err)
	}
	own, err := h.get()
	if err != nil {
		t.Fatal(err)
	}
	issued := read(r.reg, func() []mesh.Issued { return r.reg.issued })
	node := agentID("node-a")
	want := []mesh.Issued{
		mesh.IssuedOf(own.Leaf, node, "", node),
		{ID: node, Agent: node},
		mesh.IssuedOf(res[0].Chain[0], payment, "e-pay", node),
	}
	if len(issued) == 3 {
		want[1].Serial, want[1].Until = issued[1].Serial, issued[1].Until
	}
	if d := cmp.Diff(want, issued, cmpopts.EquateComparable(spiffeid.ID{})); d != "" {
		t.Errorf("recorded (-want +got):\n%s", d)
	}
}

func TestWhatIsNotRecordedIsNotGivenOut(t *testing.T) {
	for _, tc := range []struct {
		name string
		then func(*rig) error
		want error
	}{
		{"the store fails", func(*rig) error { return errors.New("disk full") }, ErrFailed},
		{"its entry goes meanwhile", func(r *rig) error {
			r.reg.change(func() { r.reg.entries = r.reg.entries[1:] })
			return nil
		}, ErrRefused},
		{"its agent is banned meanwhile", func(r *rig) error {
			a, err := r.reg.GetAgent(context.Background(), agentID("node-a"))
			a.Banned = true
			return errors.Join(err, r.reg.PutAgent(context.Background(), a))
		}, ErrBanned},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := newRig(t, newCA(t, td))
			c, _ := r.joined("node-a")
			r.reg.change(func() { r.reg.onIssued = func() error { return tc.then(r) } })
			res, err := c.NewX509SVIDs(t.Context(), []SVIDRequest{{EntryID: "e-pay", ID: payment, Key: newKey(t)}})
			if err == nil {
				if err = res[0].Err; res[0].Chain != nil {
					t.Error("the SVID was given out")
				}
			}
			if !errors.Is(err, tc.want) {
				t.Errorf("got %v, want %v", err, tc.want)
			}
		})
	}
}

// Revoke is Keeper: it knows one entry.
func (m *memory) Revoke(_ context.Context, o mesh.RevokeOrder) (mesh.RevokeResult, error) {
	if o != (mesh.RevokeOrder{Entry: "e-pay"}) && o != (mesh.RevokeOrder{Serial: "aff"}) && o != (mesh.RevokeOrder{ID: payment}) {
		return mesh.RevokeResult{}, fmt.Errorf("revoke: %w", mesh.ErrNotFound)
	}
	return mesh.RevokeResult{Revision: 9, SVIDs: []mesh.RevokedSVID{{Serial: "aff", ID: payment, Until: time.Unix(4e9, 0).UTC(), Why: mesh.WhyRevoked}}}, nil
}

func TestTheOperatorRevokes(t *testing.T) {
	a := manageRig(t).admin()
	want := mesh.RevokeResult{Revision: 9, SVIDs: []mesh.RevokedSVID{{Serial: "aff", ID: payment, Until: time.Unix(4e9, 0).UTC(), Why: mesh.WhyRevoked}}}
	for _, o := range []mesh.RevokeOrder{{Entry: "e-pay"}, {Serial: "0A:FF"}, {ID: payment}} {
		got, err := a.Revoke(t.Context(), o)
		if d := cmp.Diff(want, got, cmpopts.EquateComparable(spiffeid.ID{})); err != nil || d != "" {
			t.Errorf("%+v: %v\n%s", o, err, d)
		}
	}
	for says, o := range map[string]mesh.RevokeOrder{
		"no X.509-SVID that still holds": {Entry: "other"},
		"serial":                         {Serial: "zz"},
		"id: ":                           {ID: spiffeid.RequireFromString("spiffe://other.example/x")},
	} {
		if _, err := a.Revoke(t.Context(), o); !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), says) {
			t.Errorf("%+v: %v, want ErrRefused with %q", o, err, says)
		}
	}
	if _, err := newRig(t, newCA(t, td)).admin().Revoke(t.Context(), mesh.RevokeOrder{Entry: "e-pay"}); !errors.Is(err, ErrRefused) {
		t.Errorf("an issuer that keeps nothing: %v", err)
	}
}

// A revoked SVID opens nothing here either, whatever its entry says.
func TestARevokedOperatorHasNoRights(t *testing.T) {
	r := manageRig(t)
	cert := r.ca.issue(t, boss, newKey(t))
	entries := entryv1.NewEntryClient(r.raw(cert))
	if _, err := entries.CountEntries(t.Context(), &entryv1.CountEntriesRequest{}); err != nil {
		t.Fatal(err)
	}
	v := revocation(1, time.Hour)
	v.Serial = mesh.SerialText(cert.Leaf.SerialNumber)
	r.revoke(v)
	if _, err := entries.CountEntries(t.Context(), &entryv1.CountEntriesRequest{}); status.Code(err) != codes.PermissionDenied || !strings.Contains(err.Error(), "is revoked") {
		t.Errorf("a call after that: %v", err)
	}
	if _, err := entryv1.NewEntryClient(r.as(boss)).CountEntries(t.Context(), &entryv1.CountEntriesRequest{}); err != nil {
		t.Errorf("with a new SVID: %v", err)
	}
}
