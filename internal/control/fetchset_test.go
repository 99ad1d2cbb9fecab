package control

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"sallyport/internal/control/meshpb"
	"sallyport/internal/mesh"
)

// sets are signed sets by their hash, as an issuer gives them out.
type sets map[string][]byte

func (s sets) with(c *ServerConfig) {
	c.SetFile = func(hash string) ([]byte, error) {
		if b, ok := s[hash]; ok {
			return b, nil
		}
		return nil, fmt.Errorf("policy set %.12s: %w", hash, mesh.ErrNotFound)
	}
}

// of makes the snapshot that comes from a set.
func of(set string, snap *mesh.Snapshot) *mesh.Snapshot {
	snap.PolicySet = set
	return snap
}

// voucher fetches each set once and finds it good when it says so.
type voucher struct {
	have    map[string]bool
	fetches atomic.Int32
}

func (v *voucher) vouch(_ context.Context, set string, fetch func() ([]byte, error)) error {
	if set == "" {
		return errors.New("it names no signed set")
	}
	if v.have[set] {
		return nil
	}
	v.fetches.Add(1)
	b, err := fetch()
	if err != nil {
		return err
	}
	if !bytes.HasPrefix(b, []byte("good")) {
		return errors.New("set " + set + " is not signed")
	}
	v.have[set] = true
	return nil
}

func vouching() (Hello, *voucher) {
	v := &voucher{have: map[string]bool{}}
	h := billingHello()
	h.Vouch = v.vouch
	return h, v
}

// TestASnapshotWaitsForItsSet: a proxy that pins keys looks at the set of each
// snapshot before it acts on that, once, and says that it did.
func TestASnapshotWaitsForItsSet(t *testing.T) {
	large := append([]byte("good"), bytes.Repeat([]byte("x"), 3*setPart)...)
	all := sets{"a": large, "b": []byte("good"), "c": []byte("bad"), "d": []byte("good")}
	r := newRig(t, newCA(t, td), all.with)
	put := func(s *mesh.Snapshot) { r.reg.change(func() { r.reg.snap = s }) }
	put(of("a", snapshot(t, 10, 3, "GET")))
	c, _ := r.joined("node-b")
	h, v := vouching()
	w := newWatcher()
	subscribe(t, c, h, w)
	if got := recv(t, "snapshot", w.snaps); got.PolicySet != "a" {
		t.Errorf("it comes from set %q", got.PolicySet)
	}
	acked := func(policy uint64) {
		t.Helper()
		report(t, r, "ack", func(p mesh.Proxy) bool { return p.State == "" && p.PolicyRevision == policy && p.Verified })
	}
	acked(3)

	// The same content by another set, and the same set under another revision.
	put(of("b", snapshot(t, 11, 4, "GET")))
	if got := recv(t, "renumbered snapshot", w.snaps); got.PolicySet != "b" || got.PolicyRevision != 4 {
		t.Errorf("renumbered it is %d of set %q", got.PolicyRevision, got.PolicySet)
	}
	acked(4)
	put(of("b", snapshot(t, 12, 4, "GET")))
	recv(t, "snapshot once more", w.snaps)
	if n := v.fetches.Load(); n != 2 {
		t.Errorf("%d fetches of two sets", n)
	}

	// A bad one changes nothing, whether the content is new or not.
	put(of("c", snapshot(t, 13, 5, "PATCH")))
	p := report(t, r, "nack", func(p mesh.Proxy) bool { return p.State == mesh.Rejected })
	if p.Reason != "set c is not signed" || !p.Verified {
		t.Errorf("reported %+v", p)
	}
	put(of("", snapshot(t, 14, 6, "PATCH")))
	if p := report(t, r, "nack of no set", func(p mesh.Proxy) bool { return p.State == mesh.Rejected && p.PolicyRevision == 6 }); p.Reason != "it names no signed set" {
		t.Errorf("reported %+v", p)
	}
	// The content that was refused, vouched for at last.
	put(of("d", snapshot(t, 15, 7, "PATCH")))
	if got := recv(t, "the same content from a good set", w.snaps); got.PolicySet != "d" || got.PolicyRevision != 7 {
		t.Errorf("at last it is %d of set %q", got.PolicyRevision, got.PolicySet)
	}
	acked(7)
}

// TestASetThatCannotBeFetchedIsNoNack: nobody knows what is in it, so it is
// tried again, slower and slower, and what is in force stays.
func TestASetThatCannotBeFetchedIsNoNack(t *testing.T) {
	all := sets{"a": []byte("good")}
	var tries atomic.Int32
	there := make(chan struct{})
	r := newRig(t, newCA(t, td), func(c *ServerConfig) {
		all.with(c)
		known := c.SetFile
		c.SetFile = func(hash string) ([]byte, error) {
			if hash == "late" && tries.Add(1) >= 4 {
				select {
				case <-there:
					return []byte("good"), nil
				default:
				}
			}
			return known(hash)
		}
	})
	r.reg.change(func() { r.reg.snap = of("a", snapshot(t, 10, 3, "GET")) })
	c, _ := r.joined("node-b")
	h, _ := vouching()
	w, states := newWatcher(), make(chan error, 64)
	h.OnState = func(err error) { states <- err }
	subscribe(t, c, h, w)
	recv(t, "snapshot", w.snaps)
	r.reg.change(func() { r.reg.snap = of("late", snapshot(t, 11, 4, "PATCH")) })
	for tries.Load() < 4 {
		if err := recv(t, "state", states); err != nil && !strings.Contains(err.Error(), "policy set not fetched: fetch policy set: issuer refused: policy set late: not found") {
			t.Errorf("the stream ends with: %v", err)
		}
	}
	close(there)
	if got := recv(t, "the set at last", w.snaps); got.PolicySet != "late" {
		t.Errorf("it comes from set %q", got.PolicySet)
	}
	for {
		p := recv(t, "report", r.reg.reported)
		if p.State == mesh.Rejected {
			t.Errorf("a nack for what could not be fetched: %+v", p)
		}
		if p.PolicyRevision == 4 {
			return
		}
	}
}

// TestTooLargeASetIsRefused: it is no set, however often it is fetched.
func TestTooLargeASetIsRefused(t *testing.T) {
	all := sets{"a": []byte("good"), "huge": bytes.Repeat([]byte("x"), maxSet+1)}
	r := newRig(t, newCA(t, td), all.with)
	r.reg.change(func() { r.reg.snap = of("a", snapshot(t, 10, 3, "GET")) })
	c, _ := r.joined("node-b")
	h, _ := vouching()
	w := newWatcher()
	subscribe(t, c, h, w)
	recv(t, "snapshot", w.snaps)
	r.reg.change(func() { r.reg.snap = of("huge", snapshot(t, 11, 4, "PATCH")) })
	if p := report(t, r, "nack", func(p mesh.Proxy) bool { return p.State == mesh.Rejected }); p.Reason != "the issuer sends more than 8388608 bytes as a policy set" {
		t.Errorf("reported %+v", p)
	}
}

func TestBackoffGrowsWhileASetIsNotFetched(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := &Client{cfg: ClientConfig{Log: slog.New(slog.DiscardHandler)}, retryMin: time.Second, retryMax: time.Hour}
		ctx, stop := context.WithCancel(t.Context())
		begin, tries := time.Now(), 0
		if err := c.persist(ctx, "subscribe", nil, func(_ context.Context, up func()) error {
			up()
			if tries++; tries == 40 {
				stop()
			}
			return fmt.Errorf("%w: not there", ErrUnfetched)
		}); err != nil {
			t.Error(err)
		}
		// Thirty pauses of half an hour, give or take; of half a second if each
		// started over.
		if took := time.Since(begin); took < time.Hour || took > 40*time.Hour {
			t.Errorf("%d tries took %s", tries, took)
		}
	})
}

// TestWhoGetsASet: a set says more than a snapshot.
func TestWhoGetsASet(t *testing.T) {
	all := sets{"a": bytes.Repeat([]byte("x"), setPart+1)}
	r := newRig(t, newCA(t, td), all.with)
	_, b := r.joined("node-b")
	_, g := r.joined("node-g")
	_, n := r.joined("node-n")
	ask := func(cc *grpc.ClientConn, kind, workload, hash string) (parts []int, code codes.Code) {
		st, err := meshpb.NewMeshClient(cc).FetchSet(t.Context(), &meshpb.FetchSetRequest{Kind: kind, Workload: workload, Hash: hash})
		if err != nil {
			return nil, status.Code(err)
		}
		for {
			m, err := st.Recv()
			if err == io.EOF {
				return parts, codes.OK
			}
			if err != nil {
				return parts, status.Code(err)
			}
			parts = append(parts, len(m.GetData()))
		}
	}
	for _, tt := range []struct {
		name                 string
		cc                   *grpc.ClientConn
		kind, workload, hash string
		want                 codes.Code
	}{
		{"a sidecar with an entry", r.raw(b.cert), KindSidecar, billing.String(), "a", codes.OK},
		{"a gateway", r.raw(g.cert), KindGateway, egress.String(), "a", codes.OK},
		{"a sidecar that says it is a gateway", r.raw(b.cert), KindGateway, billing.String(), "a", codes.PermissionDenied},
		{"a node for another's workload", r.raw(b.cert), KindSidecar, payment.String(), "a", codes.PermissionDenied},
		{"a node without an entry", r.raw(n.cert), KindSidecar, billing.String(), "a", codes.PermissionDenied},
		{"nobody", r.raw(nil), KindSidecar, billing.String(), "a", codes.PermissionDenied},
		{"another kind", r.raw(b.cert), "spectator", billing.String(), "a", codes.InvalidArgument},
		{"no workload", r.raw(b.cert), KindSidecar, "", "a", codes.InvalidArgument},
		{"a set that is not kept", r.raw(b.cert), KindSidecar, billing.String(), "b", codes.NotFound},
	} {
		parts, code := ask(tt.cc, tt.kind, tt.workload, tt.hash)
		if code != tt.want || code == codes.OK && fmt.Sprint(parts) != fmt.Sprint([]int{setPart, 1}) {
			t.Errorf("%s: %v after %d, want %v", tt.name, code, parts, tt.want)
		}
	}
	bare := newRig(t, newCA(t, td))
	_, h := bare.joined("node-b")
	if _, code := ask(bare.raw(h.cert), KindSidecar, billing.String(), "a"); code != codes.FailedPrecondition {
		t.Errorf("an issuer that pins no keys: %v", code)
	}
}

// TestASetCostsWhatItWeighs: one node cannot have the issuer send without end.
func TestASetCostsWhatItWeighs(t *testing.T) {
	all := sets{"a": bytes.Repeat([]byte("x"), maxSet)}
	r := newRig(t, newCA(t, td), all.with)
	c, _ := r.joined("node-b")
	l, err := c.acquire()
	if err != nil {
		t.Fatal(err)
	}
	defer c.release(l)
	h := billingHello()
	most := 2 * workBurst * setWork / maxSet
	for n := 0; n < most; n++ {
		if _, err := c.fetchSet(t.Context(), l, &h, "a"); err != nil {
			if !errors.Is(err, ErrUnfetched) || !errors.Is(err, ErrFailed) {
				t.Errorf("fetch %d: %v", n, err)
			}
			return
		}
	}
	t.Errorf("%d sets of %d bytes were sent in a row", most, maxSet)
}
