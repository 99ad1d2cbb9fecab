package control

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"sallyport/internal/control/meshpb"
	"sallyport/internal/mesh"
)

var looker, viewer = spiffeid.RequireFromString("spiffe://corp.example/ns/ops/sa/looker"), spiffeid.RequireFromString("spiffe://corp.example/ns/ops/sa/viewer")

// lookRows let looker tap payment and billing, and viewer see what a page has.
type lookRows struct{}

func (lookRows) JudgeAdmin(who spiffeid.ID, method string, on spiffeid.ID) (mesh.Effect, string) {
	switch {
	case who == looker && method == "mesh.Tap" && (on == payment || on == billing):
		return mesh.Allow, "look"
	case who == viewer && method != "mesh.Tap":
		return mesh.Allow, "view"
	}
	return "", ""
}

func (lookRows) MayAdmin(who spiffeid.ID, method string) bool {
	return who == looker && method == "mesh.Tap" || who == viewer && method != "mesh.Tap"
}

// lookedAt is a hello that shows some calls and then what it is told to.
func lookedAt(looks chan<- Look, more <-chan *mesh.Tapped, ended chan<- error) Hello {
	h := billingHello()
	h.Version = "v2"
	h.Show = func(ctx context.Context, l Look) error {
		looks <- l
		if l.Filter.Method == "PATCH" {
			ended <- nil
			return errors.New("as many look already as may")
		}
		err := l.Show(nil)
		for err == nil {
			select {
			case t := <-more:
				err = l.Show([]*mesh.Tapped{t})
			case <-ctx.Done():
				ended <- ctx.Err()
				return nil
			}
		}
		ended <- err
		return err
	}
	return h
}

func TestAnOperatorLooksAtCallsFromAfar(t *testing.T) {
	said := new(calls)
	r := manageRig(t, func(c *ServerConfig) { c.Admins, c.OnAdmin = lookRows{}, said.note })
	c, _ := r.joined("node-b")
	looks, more, ended := make(chan Look, 1), make(chan *mesh.Tapped), make(chan error, 1)
	w := newWatcher()
	_, stop := subscribe(t, c, lookedAt(looks, more, ended), w)
	recv(t, "snapshot", w.snaps)
	a := r.remote(looker)
	ask := Tap{Workload: billing, Filter: mesh.TapFilter{Status: "5xx"}, Within: 90 * time.Second}
	seen := make(chan mesh.Tapped)
	enough := make(chan error, 1)
	n := 0
	go func() {
		enough <- a.Tap(t.Context(), ask, func(x *mesh.Tapped) error {
			seen <- *x
			if n++; n == 2 {
				return ErrEnough
			}
			return nil
		})
	}()
	if l := recv(t, "look", looks); l.By != looker.String() || l.Filter != ask.Filter {
		t.Errorf("the proxy hears %+v", l)
	}
	for _, path := range []string{"/v1/a", "/v1/b"} {
		more <- &mesh.Tapped{Path: path, Status: 503, Missed: 7}
		if x := recv(t, "call", seen); x.Path != path || x.Status != 503 || x.Missed != 7 {
			t.Errorf("seen is %+v", x)
		}
	}
	if err := recv(t, "end", enough); err != nil {
		t.Error(err)
	}
	recv(t, "end at the proxy", ended) // since nobody looks any more
	if !slices.ContainsFunc(said.list(), func(c AdminCall) bool {
		return c.Caller == looker && c.Method == "mesh.Tap" && c.On == billing && c.Rule == "look" && c.Allowed
	}) {
		t.Errorf("recorded are %+v", said.list())
	}

	// The proxy says why it shows nothing.
	refuses := ask
	refuses.Filter.Method = "PATCH"
	never := func(*mesh.Tapped) error { return errors.New("something is shown") }
	if err := a.Tap(t.Context(), refuses, never); !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "as many look already as may") {
		t.Errorf("of a proxy that refuses: %v", err)
	}
	recv(t, "look", looks)
	recv(t, "end at the proxy", ended)

	// What the local user asks for ends when the proxy does.
	gone, local := make(chan error, 1), r.admin()
	go func() { gone <- local.Tap(t.Context(), Tap{Workload: billing, Agent: agentID("node-b")}, never) }()
	if l := recv(t, "look", looks); l.By != localUser {
		t.Errorf("the proxy hears that %q looks", l.By)
	}
	stop()
	if err := recv(t, "end", gone); !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "shows no more calls") {
		t.Errorf("of a proxy that leaves: %v", err)
	}
}

func TestWhoMayNotLook(t *testing.T) {
	said := new(calls)
	r := manageRig(t, func(c *ServerConfig) { c.Admins, c.OnAdmin = lookRows{}, said.note })
	c, h := r.joined("node-b")
	old := newWatcher()
	hello := billingHello()
	hello.Version = "v1"
	subscribe(t, c, hello, old)
	recv(t, "snapshot", old.snaps)
	for _, tt := range []struct {
		name string
		a    *Admin
		ask  Tap
		want string
	}{
		{"a viewer", r.remote(viewer), Tap{Workload: billing}, "denied"},
		{"an admin by flag alone", r.remote(boss), Tap{Workload: billing}, "denied"},
		{"an agent", &Admin{cc: r.raw(h.cert)}, Tap{Workload: billing}, "denied"},
		{"of what no row names", r.remote(looker), Tap{Workload: stock}, "denied"},
		{"of an older proxy", r.remote(looker), Tap{Workload: billing}, "of an older version (v1)"},
		{"of a proxy that is not here", r.remote(looker), Tap{Workload: payment}, "no such proxy of " + payment.String()},
		{"of another agent's", r.remote(looker), Tap{Workload: billing, Agent: agentID("node-x")}, "no such proxy"},
		{"for too long", r.remote(looker), Tap{Workload: billing, Within: time.Hour}, "3600 seconds"},
		{"by no filter", r.remote(looker), Tap{Workload: billing, Filter: mesh.TapFilter{Status: "5x"}}, "status"},
		{"of another trust domain's", r.remote(looker), Tap{Workload: spiffeid.RequireFromString("spiffe://far.example/x")}, "is not a workload of"},
	} {
		err := tt.a.Tap(t.Context(), tt.ask, func(*mesh.Tapped) error { return errors.New("something is shown") })
		if !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.want)
		}
	}
	for _, who := range []spiffeid.ID{viewer, looker} {
		if !slices.ContainsFunc(said.list(), func(c AdminCall) bool { return c.Caller == who && c.Method == "mesh.Tap" && !c.Allowed }) {
			t.Errorf("that %s may not is not recorded: %+v", who, said.list())
		}
	}
	// Who guesses at looks of others gets none.
	st, err := meshpb.NewMeshClient(r.raw(h.cert)).ShowCalls(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	id, l, end, err := r.srv.looks.begin(subscriber{agentID("node-a"), payment, KindSidecar})
	if err != nil {
		t.Fatal(err)
	}
	defer end()
	_ = st.Send(&meshpb.ShownCalls{Look: id}) // what fails shows in the answer
	if err := st.RecvMsg(new(meshpb.ShownAck)); status.Code(err) != codes.NotFound {
		t.Errorf("another agent's look is answered: %v", err)
	}
	if len(l.begun) != 0 {
		t.Error("the look of another has begun")
	}
}

// An issuer has room for so many looks, and takes of a proxy what a proxy shows.
func TestLooksAreBounded(t *testing.T) {
	var ls looks
	for range maxLooks {
		_, _, end, err := ls.begin(subscriber{})
		if err != nil {
			t.Fatal(err)
		}
		defer end()
	}
	if _, _, _, err := ls.begin(subscriber{}); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("one more: %v", err)
	}
	long := &mesh.Tapped{Path: "/" + strings.Repeat("x", 1000), Headers: [][2]string{{"Accept", strings.Repeat("y", maxTapped)}}}
	list := []*mesh.Tapped{long, {Path: strings.Repeat("z", maxTapped)}}
	for range 3 * maxShown {
		list = append(list, &mesh.Tapped{Path: "/" + strings.Repeat("x", 40<<10)})
	}
	n := 0
	for _, m := range shownToWire(list) {
		n += len(m.GetCalls())
		if err := checkShown(m); err != nil || proto.Size(m) > maxRequest {
			t.Errorf("%d calls, %d bytes: %v", len(m.GetCalls()), proto.Size(m), err)
		}
	}
	if n != len(list)-1 { // of one not even the path is short
		t.Errorf("%d of %d calls are shown", n, len(list))
	}
	for name, m := range map[string]*meshpb.ShownCalls{
		"too many": {Calls: make([][]byte, maxShown+1)}, "no call": {Calls: [][]byte{[]byte("x")}}, "too long": {Calls: [][]byte{fmt.Appendf(nil, `{"path":"%s"}`, strings.Repeat("x", maxTapped))}},
	} {
		if err := checkShown(m); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A look ends with the SVID of who looks.
func TestALookEndsWithTheSVID(t *testing.T) {
	var later atomic.Int64
	r := manageRig(t, func(c *ServerConfig) {
		c.Admins, c.Now = lookRows{}, func() time.Time { return time.Now().Add(time.Duration(later.Load())) }
		c.OnAdmin = func(_ context.Context, x AdminCall) error {
			if x.On == billing { // the look is let in, and begins
				later.Store(int64(time.Minute))
			}
			return nil
		}
	})
	c, _ := r.joined("node-b")
	looks, ended := make(chan Look, 1), make(chan error, 1)
	w := newWatcher()
	subscribe(t, c, lookedAt(looks, nil, ended), w)
	recv(t, "snapshot", w.snaps)
	cert := r.ca.issue(t, looker, newKey(t), func(c *x509.Certificate) { c.NotAfter = time.Now().Add(time.Minute) })
	a := &Admin{cc: r.raw(cert)}
	err := a.Tap(t.Context(), Tap{Workload: billing, Within: mesh.LongestTap}, func(*mesh.Tapped) error { return nil })
	if !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "expired") {
		t.Errorf("it ends with %v", err)
	}
	recv(t, "look", looks)
	recv(t, "end at the proxy", ended)
}

// Who may look cannot fill the logs with looks, nor use up the streams that the proxies
// of an agent need otherwise.
func TestLooksHaveARateAndRoomOfTheirOwn(t *testing.T) {
	said := new(calls)
	r := manageRig(t, func(c *ServerConfig) { c.Admins, c.OnAdmin, c.StreamsPerAgent = lookRows{}, said.note, 1 })
	a := r.remote(looker)
	never := func(*mesh.Tapped) error { return errors.New("something is shown") }
	const tries = 100
	var err error
	for range tries {
		err = a.Tap(t.Context(), Tap{Workload: payment}, never)
	}
	if err == nil || !strings.Contains(err.Error(), "too much at once") {
		t.Errorf("the last is answered %v", err)
	}
	if n := len(said.list()); n == 0 || n > tries {
		t.Errorf("%d looks have %d records", tries, n)
	}
	id := agentID("node-a")
	for range agentLooks {
		if _, err := r.srv.enter(id, meshpb.Mesh_ShowCalls_FullMethodName); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := r.srv.enter(id, meshpb.Mesh_ShowCalls_FullMethodName); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("one look more: %v", err)
	}
	leave, err := r.srv.enter(id, meshpb.Mesh_Subscribe_FullMethodName)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.srv.enter(id, meshpb.Mesh_Subscribe_FullMethodName); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("one stream more: %v", err)
	}
	leave()
	if _, err := r.srv.enter(id, meshpb.Mesh_Subscribe_FullMethodName); err != nil {
		t.Error(err)
	}
}

// unread is the stream of an operator who reads nothing after the first message.
type unread struct {
	grpc.ServerStream
	ctx   context.Context
	heard atomic.Bool
}

func (d *unread) Context() context.Context { return d.ctx }

func (d *unread) Send(*meshpb.TapResponse) error {
	if !d.heard.Swap(true) {
		return nil
	}
	<-d.ctx.Done()
	return d.ctx.Err()
}

// An operator who reads nothing does not hold a look past its time, and a look that
// hangs in the proxy does not keep it from a new stream.
func TestLooksThatHangHoldNothingUp(t *testing.T) {
	r := manageRig(t)
	c, _ := r.joined("node-b")
	looks, more, ended, hang := make(chan Look, 1), make(chan *mesh.Tapped), make(chan error, 1), make(chan struct{})
	hello := lookedAt(looks, more, ended)
	show := hello.Show
	hello.Show = func(ctx context.Context, l Look) error {
		err := show(ctx, l)
		<-hang
		return err
	}
	connected := make(chan error, 16)
	hello.OnState = func(err error) { connected <- err }
	w := newWatcher()
	subscribe(t, c, hello, w)
	defer close(hang)
	recv(t, "snapshot", w.snaps)
	recv(t, "connected", connected)
	ctx := context.WithValue(t.Context(), operatorKey{}, operator{method: "mesh.Tap", flagged: true})
	over := make(chan error, 1)
	go func() {
		over <- (&adminAPI{s: r.srv}).Tap(&meshpb.TapRequest{Workload: billing.String(), Seconds: 1}, &unread{ctx: ctx})
	}()
	recv(t, "look", looks)
	more <- &mesh.Tapped{Path: "/v1/a"}
	if err := recv(t, "end", over); err != nil {
		t.Error(err)
	}
	recv(t, "end at the proxy", ended)
	r.srv.evict(agentID("node-b"), status.Error(codes.Unavailable, "again"))
	if err := recv(t, "loss", connected); err == nil {
		t.Error("the stream did not end")
	}
	if err := recv(t, "connected again", connected); err != nil {
		t.Error(err)
	}
}

// A peer's words neither hold a long text nor move what stands around them.
func TestPlainWords(t *testing.T) {
	for text, want := range map[string]string{"good": "good", "Gr\u00fc\u00dfe": "Gr\u00fc\u00dfe", "a\x1b[2Jb": "a [2Jb", "a\u009bb": "a b", "a\u202eb\u2066c": "abc", "a\u2028b": "a b", "\xff": "?"} {
		if got := plain(text); got != want {
			t.Errorf("%q is %q, want %q", text, got, want)
		}
	}
	long := strings.Repeat("x", 2*maxReason)
	if short := plain(long); unsafe.StringData(short) == unsafe.StringData(long) || len(short) != maxReason {
		t.Errorf("%d bytes, which hold the whole", len(short))
	}
}

func FuzzLooks(f *testing.F) {
	f.Add(wire(f, &meshpb.Look{Id: "x", By: "y", Filter: "status=5xx", Seconds: 30}))
	f.Add(wire(f, &meshpb.ShownCalls{Look: "x", Calls: [][]byte{[]byte(`{"path":"/x","status":200}`)}}))
	f.Add(wire(f, &meshpb.TapRequest{Workload: billing.String(), Filter: "path=%2Fx"}))
	f.Fuzz(func(t *testing.T, b []byte) {
		var look meshpb.Look
		if proto.Unmarshal(b, &look) == nil {
			if l, within, err := lookFromWire(&look); err == nil && (l.By == "" || l.Filter.Validate() != nil || within <= 0 || within > mesh.LongestTap) {
				t.Fatalf("accepted %+v for %s", l, within)
			}
		}
		var shown meshpb.ShownCalls
		if proto.Unmarshal(b, &shown) == nil {
			if err := checkShown(&shown); err != nil {
				refusedInWords(t, err)
			}
		}
		var ask meshpb.TapRequest
		if proto.Unmarshal(b, &ask) == nil {
			if q, err := tapFromWire(&ask, td); err != nil {
				refusedInWords(t, err)
			} else if !q.workload.MemberOf(td) || q.within <= 0 {
				t.Fatalf("accepted %+v", q)
			}
		}
	})
}
