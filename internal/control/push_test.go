package control

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"sallyport/internal/control/meshpb"
	"sallyport/internal/mesh"
)

// policyKeeper is a PolicyKeeper that notes what it is asked for.
type policyKeeper struct {
	pushes []PolicyPush
	moves  []PolicyMove
	set    []byte
	err    error
}

func (k *policyKeeper) PushPolicies(_ context.Context, p PolicyPush) error {
	k.pushes = append(k.pushes, p)
	return k.err
}

func (k *policyKeeper) MovePolicies(_ context.Context, m PolicyMove) error {
	k.moves = append(k.moves, m)
	return k.err
}

func (k *policyKeeper) PolicySet(_ context.Context, revision uint64) ([]byte, error) {
	if revision == 9 {
		return nil, fmt.Errorf("revision 9: %w", mesh.ErrNotFound)
	}
	return k.set, k.err
}

var (
	pusher = spiffeid.RequireFromString("spiffe://corp.example/ns/ops/sa/pusher")
	barred = spiffeid.RequireFromString("spiffe://corp.example/ns/ops/sa/barred")
)

// pushRows let the pusher push and look. They name barred, and deny it.
type pushRows struct{ local mesh.Effect }

func (r pushRows) JudgeAdmin(who spiffeid.ID, method string, on spiffeid.ID) (mesh.Effect, string) {
	switch {
	case who.IsZero():
		return r.local, "local"
	case method == "mesh.Proxies" && on == billing:
		return mesh.Deny, "hide-billing"
	case who == pusher && strings.HasPrefix(method, "mesh."):
		return mesh.Allow, "push"
	case who == barred && on.IsZero():
		return mesh.Deny, "not-you"
	}
	return "", ""
}

func (r pushRows) MayAdmin(who spiffeid.ID, method string) bool {
	return (who == pusher || who == barred) && strings.HasPrefix(method, "mesh.")
}

// remote is an Admin from afar under an identity.
func (r *rig) remote(id spiffeid.ID) *Admin {
	r.t.Helper()
	cert := r.ca.issue(r.t, id, newKey(r.t))
	a, err := DialAdminAt(ClientConfig{
		Addresses: []string{r.addr}, TrustDomain: td, Log: slog.New(slog.DiscardHandler),
		Bundle:   func() []*x509.Certificate { return []*x509.Certificate{r.ca.root} },
		Identity: func() (*tls.Certificate, error) { return cert, nil },
	})
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { a.Close() })
	return a
}

// TestPushOverTheNetwork is allowed to whom a row allows it: the flag of an
// entry does not do, nor does an agent's SVID.
func TestPushOverTheNetwork(t *testing.T) {
	k, said := &policyKeeper{set: bytes.Repeat([]byte("set\n"), 700_000)}, new(calls)
	r := manageRig(t, func(c *ServerConfig) { c.Policies, c.Admins, c.OnAdmin = k, pushRows{}, said.note })
	_, h := r.joined("node-a")
	ctx := t.Context()
	ok := r.remote(pusher)
	push := PolicyPush{Set: bytes.Repeat([]byte("x"), 5<<20), Fallback: bytes.Repeat([]byte("y"), 3<<20), Group: []string{"kind=gateway", "5%"}, Bake: time.Minute}
	if err := ok.PushPolicy(ctx, push); err != nil {
		t.Fatal(err)
	}
	push.By = pusher.String()
	// The bytes by themselves: cmp looks at one after another, which takes the race
	// detector minutes.
	if len(k.pushes) != 1 || !bytes.Equal(k.pushes[0].Set, push.Set) || !bytes.Equal(k.pushes[0].Fallback, push.Fallback) {
		t.Fatalf("pushed are %d", len(k.pushes))
	}
	got := k.pushes[0]
	got.Set, got.Fallback, push.Set, push.Fallback = nil, nil, nil, nil
	if !cmp.Equal(got, push) {
		t.Errorf("pushed is %s", cmp.Diff(push, got))
	}
	if err := ok.PushPolicy(ctx, PolicyPush{Set: []byte("x"), Overtake: true}); err != nil || !k.pushes[1].Overtake || k.pushes[1].Group != nil {
		t.Errorf("to overtake: %v", err)
	}
	if err := ok.MovePolicy(ctx, PolicyMove{Move: MovePromote, Revision: 8, Force: true}); err != nil || !slices.Equal(k.moves, []PolicyMove{{MovePromote, 8, true, pusher.String()}}) {
		t.Errorf("to promote: %v, %+v", err, k.moves)
	}
	if set, err := ok.PolicySet(ctx, 0); err != nil || !bytes.Equal(set, k.set) {
		t.Errorf("the set: %d bytes, %v", len(set), err)
	}
	if _, err := ok.PolicySet(ctx, 9); !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "revision 9") {
		t.Errorf("a set that is not kept: %v", err)
	}
	if st, err := ok.Status(ctx); err != nil || st.PolicyRevision != 3 {
		t.Errorf("status: %+v, %v", st, err)
	}
	for _, w := range []spiffeid.ID{billing, payment} {
		r.reg.ReportProxy(mesh.Proxy{Agent: agentID("node-a"), Workload: w, Kind: KindSidecar, Group: mesh.GroupCanary, Wanted: 8, PolicyHash: "ab", Since: time.Unix(1e9, 0).UTC()})
	}
	ps, err := ok.Proxies(ctx)
	if err != nil || len(ps) != 1 || ps[0].Workload != payment || ps[0].Group != mesh.GroupCanary || ps[0].Wanted != 8 || ps[0].PolicyHash != "ab" || ps[0].Since.Unix() != 1e9 {
		t.Errorf("proxies: %+v, %v", ps, err)
	}
	if call := (AdminCall{Caller: pusher, Method: "mesh.PushPolicy", Rule: "push", Allowed: true}); !slices.ContainsFunc(said.list(), func(c AdminCall) bool { c.Peer = ""; return c == call }) {
		t.Errorf("recorded are %+v", said.list())
	}

	// Whoever may not.
	k.pushes, k.moves = nil, nil
	for _, who := range []struct {
		name string
		a    *Admin
		rule string
	}{
		{"named, and denied", r.remote(barred), "not-you"},
		{"an admin by flag alone", r.remote(boss), ""},
		{"a workload without a row", r.remote(payment), ""},
		{"an agent", &Admin{cc: r.raw(h.cert)}, ""},
	} {
		said.mu.Lock()
		said.all = nil
		said.mu.Unlock()
		for what, err := range map[string]error{
			"push": who.a.PushPolicy(ctx, PolicyPush{Set: []byte("x")}),
			"move": who.a.MovePolicy(ctx, PolicyMove{Move: MoveTakeBack}),
			"set":  second(who.a.PolicySet(ctx, 0)), "status": second(who.a.Status(ctx)),
		} {
			if !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "denied") {
				t.Errorf("%s: %s: %v", who.name, what, err)
			}
		}
		if who.name != "an agent" && !slices.ContainsFunc(said.list(), func(c AdminCall) bool { return !c.Allowed && c.Rule == who.rule }) {
			t.Errorf("%s: recorded are %+v", who.name, said.list())
		}
	}
	if _, err := meshpb.NewAdminClient(r.raw(nil)).Status(ctx, &meshpb.StatusRequest{}); status.Code(err) != codes.PermissionDenied {
		t.Errorf("a stranger: %v", err)
	}
	if len(k.pushes)+len(k.moves) > 0 {
		t.Errorf("the keeper is asked by those who may not: %+v %+v", k.pushes, k.moves)
	}
	// What else the socket serves stays there.
	if _, err := ok.Roots(ctx); !errors.Is(err, ErrRefused) {
		t.Errorf("roots from afar: %v", err)
	}
	if _, err := ok.CreateJoinToken(ctx, "n", 0); !errors.Is(err, ErrRefused) {
		t.Errorf("a token from afar: %v", err)
	}
}

func second[T any](_ T, err error) error { return err }

func TestPushIsWhole(t *testing.T) {
	k := &policyKeeper{}
	r := manageRig(t, func(c *ServerConfig) { c.Policies = k })
	canary := &meshpb.Canary{Group: []string{"5%"}}
	for _, tt := range []struct {
		name string
		msgs []*meshpb.PushPolicyRequest
		want string
	}{
		{"nothing", nil, "without a set"},
		{"no set", []*meshpb.PushPolicyRequest{{Overtake: true}}, "without a set"},
		{"a group of nobody", []*meshpb.PushPolicyRequest{{Set: []byte("x"), Canary: &meshpb.Canary{}}}, "without a selector"},
		{"a negative bake", []*meshpb.PushPolicyRequest{{Set: []byte("x"), Canary: &meshpb.Canary{Group: canary.Group, BakeSeconds: -1}}}, "bake"},
		{"an endless bake", []*meshpb.PushPolicyRequest{{Set: []byte("x"), Canary: &meshpb.Canary{Group: canary.Group, BakeSeconds: 1 << 62}}}, "bake"},
		{"a group that comes later", []*meshpb.PushPolicyRequest{{Set: []byte("x")}, {Canary: canary}}, "only the first message"},
		{"an end that comes later", []*meshpb.PushPolicyRequest{{Set: []byte("x")}, {Overtake: true}}, "only the first message"},
		{"a group that overtakes", []*meshpb.PushPolicyRequest{{Set: []byte("x"), Canary: canary, Overtake: true}}, "overtakes nothing"},
		{"a fallback of nobody", []*meshpb.PushPolicyRequest{{Set: []byte("x"), Fallback: []byte("x")}}, "fallback is of a canary group"},
		{"too much", slices.Repeat([]*meshpb.PushPolicyRequest{{Set: make([]byte, 1<<20)}}, 9), "at most"},
		{"too much of a fallback", slices.Repeat([]*meshpb.PushPolicyRequest{{Fallback: make([]byte, 1<<20)}}, 9), "at most"},
	} {
		st, err := meshpb.NewAdminClient(r.admin().cc).PushPolicy(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range tt.msgs {
			if st.Send(m) != nil {
				break // the answer says why
			}
		}
		if _, err := st.CloseAndRecv(); status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.want)
		}
	}
	if err := r.admin().MovePolicy(t.Context(), PolicyMove{Move: "sideways"}); !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), `neither "promote" nor "take_back"`) {
		t.Errorf("another move: %v", err)
	}
	if len(k.pushes)+len(k.moves) > 0 {
		t.Error("the keeper is asked")
	}
	// A push that breaks off is none.
	ctx, cancel := context.WithCancel(t.Context())
	st, err := meshpb.NewAdminClient(r.admin().cc).PushPolicy(ctx)
	if err != nil {
		t.Fatal(err)
	}
	// Each is more than may wait unread: when the third has gone, one was read.
	for range 3 {
		if err := st.Send(&meshpb.PushPolicyRequest{Set: make([]byte, 3*streamWindow)}); err != nil {
			t.Fatal(err)
		}
	}
	cancel()
	if err := st.RecvMsg(&meshpb.PushPolicyResponse{}); status.Code(err) != codes.Canceled { // to close it would be to end it whole
		t.Errorf("broken off: %v", err)
	}
	r.stop() // waits for the handler
	r.start()
	if len(k.pushes) > 0 {
		t.Error("half a set is pushed")
	}
}

// TestPushDeniedLocally holds the user of the socket to a row that denies.
func TestPushDeniedLocally(t *testing.T) {
	k := &policyKeeper{}
	r := manageRig(t, func(c *ServerConfig) { c.Policies, c.Admins = k, pushRows{local: mesh.Deny} })
	if err := r.admin().PushPolicy(t.Context(), PolicyPush{Set: []byte("x")}); !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "row local of admin.csv denies it") || len(k.pushes) > 0 {
		t.Errorf("denied: %v", err)
	}
}
