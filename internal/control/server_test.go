package control

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/url"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"sallyport/internal/control/meshpb"
	"sallyport/internal/mesh"
)

func TestAnAgentGetsAllItNeeds(t *testing.T) {
	r := newRig(t, newCA(t, td))
	c, h := r.joined("node-a")
	ctx := t.Context()

	entries, err := c.SyncEntries(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if len(entries) != 1 || entries[0].SPIFFEID != payment || entries[0].X509TTL != 30*time.Second || entries[0].Hint != "main" {
		t.Fatalf("entries %+v, want payment's alone", entries)
	}
	key := newKey(t)
	got, err := c.NewX509SVIDs(ctx, []SVIDRequest{
		{EntryID: "e-pay", ID: payment, Key: key},
		{EntryID: "e-bill", ID: billing, Key: key},
	})
	if err != nil {
		t.Fatal(err)
	}
	if got[0].Err != nil || len(got[0].Chain) != 2 {
		t.Fatalf("payment's SVID: %v, chain of %d", got[0].Err, len(got[0].Chain))
	}
	leaf := got[0].Chain[0]
	if left := time.Until(leaf.NotAfter); left > 30*time.Second || leaf.DNSNames[0] != "payment.mesh.internal" {
		t.Errorf("SVID lives %s with names %v, want the entry's", left, leaf.DNSNames)
	}
	if !errors.Is(got[1].Err, ErrRefused) {
		t.Errorf("another agent's entry: %v, want ErrRefused", got[1].Err)
	}
	if _, err := verifyPeer(got[0].Chain, r.ca.X509Bundle(), td, time.Now()); err != nil {
		t.Error(err)
	}
	tok, err := c.NewJWTSVID(ctx, "e-pay", []string{"billing"})
	if err != nil || tok.ID != payment || !strings.Contains(tok.Token, "[billing]") || !tok.Expires.After(tok.Issued) {
		t.Errorf("token %+v, %v", tok, err)
	}
	if _, err := c.NewJWTSVID(ctx, "e-pay", nil); !errors.Is(err, ErrRefused) {
		t.Errorf("token without audience: %v, want ErrRefused", err)
	}
	b, err := c.GetBundle(ctx)
	if err != nil || len(b.X509) != 1 || !b.X509[0].Equal(r.ca.root) || len(b.JWT) != 1 || b.JWT[0].KeyID != "k1" {
		t.Errorf("bundle %+v, %v", b, err)
	}
	if a, err := r.reg.GetAgent(ctx, agentID("node-a")); err != nil || a.Serial != h.cert.Leaf.SerialNumber.String() || a.AttestationType != "join_token" {
		t.Errorf("agent on record: %+v", a)
	}
}

func TestEdgesAreTakenFromTheirOwnAgentOnly(t *testing.T) {
	r := newRig(t, newCA(t, td))
	c, _ := r.joined("node-a")
	first := time.Unix(1e9, 0).UTC()
	own := mesh.Edge{Src: payment.String(), Dst: billing.String(), Proto: "http", Allowed: 3, Denied: 1, MTLS: true, First: first, Last: first, Took: mesh.Histogram{0, 3}}
	if err := c.ReportEdges(t.Context(), []mesh.Edge{own}); err != nil {
		t.Fatal(err)
	}
	if got := r.reg.counted(); len(got) != 1 || !reflect.DeepEqual(got[0], own) {
		t.Errorf("edges %+v", got)
	}
	alien := mesh.Edge{Src: billing.String(), Dst: stock.String(), Allowed: 1}
	if err := c.ReportEdges(t.Context(), []mesh.Edge{own, alien}); !errors.Is(err, ErrRefused) {
		t.Errorf("edge of others: %v, want ErrRefused", err)
	}
	out := mesh.Edge{Src: stock.String(), Dst: "host:api.example", Proto: "tcp", Allowed: 1}
	if err := c.ReportEdges(t.Context(), []mesh.Edge{out}); !errors.Is(err, ErrRefused) {
		t.Errorf("edge to a host, told by no gateway: %v, want ErrRefused", err)
	}
	if n := len(r.reg.counted()); n != 1 {
		t.Errorf("%d edges after refused reports, want 1", n)
	}
	r.reg.mu.Lock()
	r.reg.proxies[egress] = mesh.Proxy{Agent: agentID("node-a"), Workload: egress, Kind: KindGateway}
	r.reg.mu.Unlock()
	if err := c.ReportEdges(t.Context(), []mesh.Edge{out}); err != nil {
		t.Errorf("edge to a host, told by its gateway: %v", err)
	}
	long := mesh.Edge{Src: "spiffe://other.example/" + strings.Repeat("a", 600), Dst: own.Src, Allowed: 1}
	if err := c.ReportEdges(t.Context(), []mesh.Edge{long, {Src: own.Src, Dst: "host:other", Denied: 1}, {Dst: own.Src, Denied: 1}, {Src: "other", Dst: "other", Allowed: 1}}); err != nil {
		t.Errorf("edges of a caller with a long name, of nobody, to an unlisted host and of the rest: %v", err)
	}
	if got := r.reg.counted(); got[2].Src != "other" {
		t.Errorf("a caller with a long name is counted as %.40q, want other", got[2].Src)
	}
	for _, bad := range []mesh.Edge{
		{Src: own.Src, Dst: own.Dst, Allowed: maxEdgeCount + 1},
		{Src: own.Src, Dst: own.Dst, Allowed: 1, Took: make(mesh.Histogram, mesh.Buckets+1)},
		{Src: own.Src, Dst: strings.Repeat("<", 2048), Allowed: 1},
		{Src: own.Src, Dst: "spiffe://corp.example/" + strings.Repeat("<", 100), Allowed: 1},
		{Src: own.Src, Dst: "host:" + strings.Repeat("a.", 200) + "example", Allowed: 1},
		{Src: own.Src, Dst: "host:<b>", Allowed: 1},
		{Src: own.Src, Dst: own.Dst, Proto: "<b>", Allowed: 1},
	} {
		if err := c.ReportEdges(t.Context(), []mesh.Edge{bad}); !errors.Is(err, ErrRefused) {
			t.Errorf("edge that nobody can have, to %.40s: %v, want ErrRefused", bad.Dst, err)
		}
	}
}

func TestARenewedSVIDReplacesTheOldOneAtItsFirstUse(t *testing.T) {
	r := newRig(t, newCA(t, td))
	c, h := r.joined("node-a")
	ctx, old := t.Context(), h.cert
	// The reply to the first renewal is lost: it is simply not used.
	if _, err := c.Renew(ctx, newKey(t)); err != nil {
		t.Fatal(err)
	}
	key := newKey(t)
	svid, err := c.Renew(ctx, key)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.SyncEntries(ctx); err != nil {
		t.Fatalf("the old SVID before the new one is used: %v", err)
	}
	h.set(pair(svid, key))
	if _, err := c.SyncEntries(ctx); err != nil {
		t.Fatalf("the new SVID: %v", err)
	}
	a, err := r.reg.GetAgent(ctx, svid.ID)
	if err != nil || a.Serial != svid.Chain[0].SerialNumber.String() || a.NextSerial != "" || !a.ExpiresAt.Equal(svid.Chain[0].NotAfter) {
		t.Errorf("agent on record: %+v", a)
	}
	h.set(old)
	if _, err := c.SyncEntries(ctx); !errors.Is(err, ErrMustReattest) {
		t.Errorf("the old SVID afterwards: %v, want ErrMustReattest", err)
	}
}

func TestALostAttestationReplyIsRepeated(t *testing.T) {
	r := newRig(t, newCA(t, td))
	h := &holder{}
	c := r.client(h)
	key := newKey(t)
	if _, err := c.Attest(t.Context(), "join_token", []byte("node-a"), key); err != nil {
		t.Fatal(err)
	}
	again, err := c.Attest(t.Context(), "join_token", []byte("node-a"), key)
	if err != nil {
		t.Fatal(err)
	}
	h.set(pair(again, key))
	if _, err := c.SyncEntries(t.Context()); err != nil {
		t.Errorf("the repeated SVID: %v", err)
	}
}

func TestAttestationIsRefusedWithAReason(t *testing.T) {
	var seen []Attestation
	r := newRig(t, newCA(t, td), func(c *ServerConfig) {
		c.OnAttest = func(_ context.Context, a Attestation) error {
			a.Peer = ""
			seen = append(seen, a)
			return nil
		}
	})
	r.reg.agents[agentID("bad")] = mesh.Agent{ID: agentID("bad"), Banned: true}
	c := r.client(&holder{})
	for _, tt := range []struct {
		payload, kind string
		want          error
		record        Attestation
	}{
		{"expired", "join_token", ErrTokenExpired, Attestation{Type: "join_token", Refusal: RefusalTokenExpired}},
		{"used", "join_token", ErrTokenUsed, Attestation{Type: "join_token", Refusal: RefusalTokenUsed}},
		{"not a name", "join_token", ErrTokenUnknown, Attestation{Type: "join_token", Refusal: RefusalTokenUnknown}},
		{"bad", "join_token", ErrBanned, Attestation{Agent: agentID("bad"), Type: "join_token", Refusal: RefusalBanned}},
		{"x", "tea_leaves", ErrRefused, Attestation{Type: "tea_leaves", Refusal: RefusalKind}},
		{"broken", "join_token", ErrFailed, Attestation{}},
		{"foreign", "join_token", ErrFailed, Attestation{}},
		{"panic", "join_token", ErrFailed, Attestation{}},
	} {
		seen = nil
		_, err := c.Attest(t.Context(), tt.kind, []byte(tt.payload), newKey(t))
		if !errors.Is(err, tt.want) {
			t.Errorf("%s: %v, want %v", tt.payload, err, tt.want)
		}
		for _, secret := range []string{"disk", "goroutine"} {
			if err != nil && strings.Contains(err.Error(), secret) {
				t.Errorf("%s: error tells %q: %v", tt.payload, secret, err)
			}
		}
		var want []Attestation
		if tt.record.Type != "" {
			want = []Attestation{tt.record}
		}
		if !slices.Equal(seen, want) {
			t.Errorf("%s: recorded %+v, want %+v", tt.payload, seen, want)
		}
	}
}

func TestAttestationThatCannotBeRecordedDoesNotHappen(t *testing.T) {
	r := newRig(t, newCA(t, td), func(c *ServerConfig) {
		c.OnAttest = func(context.Context, Attestation) error { return errBroken }
	})
	if _, err := r.client(&holder{}).Attest(t.Context(), "join_token", []byte("node-a"), newKey(t)); !errors.Is(err, ErrFailed) {
		t.Errorf("got %v, want ErrFailed", err)
	}
	if read(r.reg, func() int { return len(r.reg.agents) }) != 0 {
		t.Error("the agent is on record")
	}
}

func TestKeyPolicy(t *testing.T) {
	csr := func(k crypto.Signer) []byte {
		der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, k)
		if err != nil {
			t.Fatal(err)
		}
		return der
	}
	ec := func(c elliptic.Curve) crypto.Signer {
		k, _ := ecdsa.GenerateKey(c, rand.Reader)
		return k
	}
	rsaKey := func(bits int) crypto.Signer {
		k, err := rsa.GenerateKey(rand.Reader, bits)
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	_, ed, _ := ed25519.GenerateKey(rand.Reader)
	forged := csr(ec(elliptic.P256()))
	forged[len(forged)-1] ^= 1
	for _, tt := range []struct {
		name string
		der  []byte
		want string
	}{
		{"EC P-256 is accepted", csr(ec(elliptic.P256())), ""},
		{"EC P-384 is accepted", csr(ec(elliptic.P384())), ""},
		{"RSA 2048 is accepted", csr(rsaKey(2048)), ""},
		{"RSA 1024 is refused", csr(rsaKey(1024)), "RSA of 1024 bits"},
		{"EC P-224 is refused", csr(ec(elliptic.P224())), "EC P-224"},
		{"EC P-521 is refused", csr(ec(elliptic.P521())), "EC P-521"},
		{"Ed25519 is refused", csr(ed), "unknown kind"},
		{"a request signed by another key is refused", forged, "not signed"},
		{"no request is refused", nil, "missing"},
		{"noise is refused", []byte("noise"), "not valid DER"},
		{"a huge request is refused", make([]byte, maxCSR+1), "at most"},
	} {
		_, err := requestKey(tt.der)
		if tt.want == "" && err != nil {
			t.Errorf("%s: %v", tt.name, err)
		}
		if tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.want)
		}
	}
}

// TestOnlyAnActiveAgentIsServed calls with every kind of wrong certificate.
func TestOnlyAnActiveAgentIsServed(t *testing.T) {
	a := newCA(t, td)
	r := newRig(t, a)
	known, unknown, banned := agentID("known"), agentID("unknown"), agentID("banned")
	key := newKey(t)
	good := a.issue(t, known, key)
	bad := a.issue(t, banned, key)
	r.reg.agents[known] = mesh.Agent{ID: known, Serial: good.Leaf.SerialNumber.String()}
	r.reg.agents[banned] = mesh.Agent{ID: banned, Serial: bad.Leaf.SerialNumber.String(), Banned: true}
	other := newCA(t, td)
	foreign := spiffeid.RequireFromString("spiffe://other.example/spire/agent/join_token/known")
	none := codes.OK
	for _, tt := range []struct {
		name string
		cert *tls.Certificate
		code codes.Code
		why  types.PermissionDeniedDetails_Reason
	}{
		{"the active agent", good, none, 0},
		{"no certificate", nil, codes.PermissionDenied, 0},
		{"a workload", a.issue(t, payment, key), codes.PermissionDenied, 0},
		{"an agent never attested", a.issue(t, unknown, key), codes.PermissionDenied, types.PermissionDeniedDetails_AGENT_NOT_ATTESTED},
		{"a banned agent", bad, codes.PermissionDenied, types.PermissionDeniedDetails_AGENT_BANNED},
		{"an SVID that was replaced", a.issue(t, known, key), codes.PermissionDenied, types.PermissionDeniedDetails_AGENT_NOT_ACTIVE},
		{"another root", other.issue(t, known, key), codes.Unavailable, 0},
		{"another trust domain", a.issue(t, foreign, key), codes.Unavailable, 0},
		{"an expired SVID", a.issue(t, known, key, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) }), codes.Unavailable, 0},
		{"no key usage", a.issue(t, known, key, func(c *x509.Certificate) { c.KeyUsage = 0 }), codes.Unavailable, 0},
		{"a CA", a.issue(t, known, key, func(c *x509.Certificate) { c.IsCA = true }), codes.Unavailable, 0},
		{"a leaf that may sign", a.issue(t, known, key, func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign }), codes.Unavailable, 0},
		{"two URI names", a.issue(t, known, key, func(c *x509.Certificate) { c.URIs = append(c.URIs, payment.URL()) }), codes.Unavailable, 0},
		{"no URI name", a.issue(t, known, key, func(c *x509.Certificate) { c.URIs = nil }), codes.Unavailable, 0},
		{"a root path", a.issue(t, td.ID(), key), codes.Unavailable, 0},
		{"client usage alone", a.issue(t, known, key, func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[1:] }), codes.Unavailable, 0},
		{"a query in the ID", a.issue(t, known, key, func(c *x509.Certificate) {
			c.URIs = []*url.URL{{Scheme: "spiffe", Host: td.Name(), Path: known.Path(), RawQuery: "a=b"}}
		}), codes.Unavailable, 0},
	} {
		cc := r.client(&holder{})
		l, err := cc.open(tt.cert)
		if err != nil {
			t.Fatal(err)
		}
		_, err = entryv1.NewEntryClient(l.cc).GetAuthorizedEntries(t.Context(), &entryv1.GetAuthorizedEntriesRequest{})
		l.cc.Close()
		st := status.Convert(err)
		var got types.PermissionDeniedDetails_Reason
		for _, d := range st.Details() {
			got = d.(*types.PermissionDeniedDetails).GetReason()
		}
		if st.Code() != tt.code || got != tt.why {
			t.Errorf("%s: %v with reason %v, want %v with %v", tt.name, err, got, tt.code, tt.why)
		}
	}
}

// TestWhatAgentsMayNotCall: an agent has no way to the operator's methods.
func TestWhatAgentsMayNotCall(t *testing.T) {
	r := newRig(t, newCA(t, td))
	c, _ := r.joined("node-a")
	l, err := c.acquire()
	if err != nil {
		t.Fatal(err)
	}
	defer c.release(l)
	ctx := t.Context()
	for name, call := range map[string]func() error{
		"agent.CreateJoinToken": func() error {
			_, err := agentv1.NewAgentClient(l.cc).CreateJoinToken(ctx, &agentv1.CreateJoinTokenRequest{Ttl: 60})
			return err
		},
		"agent.ListAgents": func() error {
			_, err := agentv1.NewAgentClient(l.cc).ListAgents(ctx, &agentv1.ListAgentsRequest{})
			return err
		},
		"entry.ListEntries": func() error {
			_, err := entryv1.NewEntryClient(l.cc).ListEntries(ctx, &entryv1.ListEntriesRequest{})
			return err
		},
		"svid.MintX509SVID": func() error {
			_, err := svidv1.NewSVIDClient(l.cc).MintX509SVID(ctx, &svidv1.MintX509SVIDRequest{})
			return err
		},
		"mesh.Status": func() error {
			_, err := meshpb.NewAdminClient(l.cc).Status(ctx, &meshpb.StatusRequest{})
			return err
		},
		"mesh.Revoke": func() error {
			_, err := meshpb.NewAdminClient(l.cc).Revoke(ctx, &meshpb.RevokeRequest{})
			return err
		},
	} {
		want := codes.PermissionDenied
		if name == "mesh.Revoke" {
			want = codes.Unimplemented // it is on the admin socket only
		}
		if got := status.Code(call()); got != want {
			t.Errorf("%s: %v, want %v", name, got, want)
		}
	}
	if _, err := bundlev1.NewBundleClient(l.cc).GetFederatedBundle(ctx, &bundlev1.GetFederatedBundleRequest{TrustDomain: "other.example"}); status.Code(err) != codes.NotFound {
		t.Errorf("federated bundle: %v, want NotFound", err)
	}
	if _, err := healthpb.NewHealthClient(l.cc).Check(ctx, &healthpb.HealthCheckRequest{}); err != nil {
		t.Errorf("health: %v", err)
	}
	if _, err := agentv1.NewAgentClient(l.cc).PostStatus(ctx, &agentv1.PostStatusRequest{}); err != nil {
		t.Errorf("post status: %v", err)
	}
}

func TestManyEntriesAreSyncedByPages(t *testing.T) {
	r := newRig(t, newCA(t, td))
	r.reg.entries = nil
	for i := range 2*entryPage + 7 {
		id := spiffeid.RequireFromSegments(td, "w", "n"+strings.Repeat("x", i%7), string(rune('a'+i%26)))
		r.reg.entries = append(r.reg.entries, mesh.Entry{ID: "e" + big5(i), SPIFFEID: id, ParentID: agentID("node-a")})
	}
	c, _ := r.joined("node-a")
	got, err := c.SyncEntries(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(got) != len(r.reg.entries) || got[0].ID != "e00000" || got[len(got)-1].ID != "e"+big5(len(got)-1) {
		t.Errorf("%d entries from %s, want %d", len(got), got[0].ID, len(r.reg.entries))
	}
	l, err := c.acquire()
	if err != nil {
		t.Fatal(err)
	}
	defer c.release(l)
	for _, req := range []*entryv1.SyncAuthorizedEntriesRequest{
		{Ids: []string{"e00000"}},
		{OutputMask: &types.EntryMask{SpiffeId: true}},
	} {
		st, err := entryv1.NewEntryClient(l.cc).SyncAuthorizedEntries(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		st.Send(req)
		if _, err := st.Recv(); status.Code(err) != codes.InvalidArgument {
			t.Errorf("first request %v: %v, want InvalidArgument", req, err)
		}
	}
	resp, err := entryv1.NewEntryClient(l.cc).GetAuthorizedEntries(t.Context(), &entryv1.GetAuthorizedEntriesRequest{OutputMask: &types.EntryMask{SpiffeId: true}})
	if err != nil || len(resp.Entries) != len(r.reg.entries) || resp.Entries[0].ParentId != nil || resp.Entries[0].SpiffeId == nil {
		t.Errorf("masked entries: %v", err)
	}
}

func big5(i int) string {
	s := "00000"
	for p := 4; i > 0; p-- {
		s = s[:p] + string(rune('0'+i%10)) + s[p+1:]
		i /= 10
	}
	return s
}

func TestEntryRevisionsRiseWithContentOnly(t *testing.T) {
	var r entryRevisions
	e := mesh.Entry{ID: "a", SPIFFEID: payment, ParentID: agentID("n")}
	if got := r.of(e, 5); got != 5 {
		t.Errorf("first seen: %d, want the policy revision 5", got)
	}
	e.Origin = mesh.Origin{File: "entries.yaml", Line: 9}
	if got := r.of(e, 9); got != 5 {
		t.Errorf("moved in its file: %d, want 5 still", got)
	}
	e.Hint = "new"
	if got := r.of(e, 9); got != 9 {
		t.Errorf("changed: %d, want 9", got)
	}
	e.Hint = "newer"
	if got := r.of(e, 9); got != 10 {
		t.Errorf("changed again: %d, want 10", got)
	}
}

func TestStreamsOfAnAgentAreBounded(t *testing.T) {
	r := newRig(t, newCA(t, td), func(c *ServerConfig) { c.StreamsPerAgent = 2 })
	c, _ := r.joined("node-a")
	l, err := c.acquire()
	if err != nil {
		t.Fatal(err)
	}
	defer c.release(l)
	var last grpc.BidiStreamingClient[meshpb.AuditBatch, meshpb.AuditAck]
	for i := range 3 {
		if last, err = meshpb.NewMeshClient(l.cc).UploadAudit(t.Context()); err != nil {
			t.Fatal(err)
		}
		if _, err := last.Header(); err != nil && i < 2 {
			t.Fatal(err)
		}
	}
	if _, err := last.Recv(); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("third stream: %v, want ResourceExhausted", err)
	}
}

func TestASilentStreamIsEnded(t *testing.T) {
	r := newRig(t, newCA(t, td))
	c, h := r.joined("node-a")
	r.retune(func(s *Server) { s.hello = 2 * time.Second })
	l, err := c.acquire()
	if err != nil {
		t.Fatal(err)
	}
	defer c.release(l)
	attest, err := agentv1.NewAgentClient(l.cc).AttestAgent(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := attest.Recv(); status.Code(err) != codes.DeadlineExceeded {
		t.Errorf("attestation without a word: %v, want DeadlineExceeded", err)
	}
	sub, err := meshpb.NewMeshClient(l.cc).Subscribe(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := sub.Recv(); status.Code(err) != codes.DeadlineExceeded {
		t.Errorf("subscription without a hello: %v, want DeadlineExceeded", err)
	}
	// An answer in the place of the hello is none.
	r.retune(func(s *Server) { s.hello = time.Minute })
	if sub, err = meshpb.NewMeshClient(r.raw(h.cert)).Subscribe(t.Context()); err != nil {
		t.Fatal(err)
	}
	sub.Send(&meshpb.SubscribeRequest{Message: &meshpb.SubscribeRequest_Ack{Ack: &meshpb.Ack{}}})
	if _, err := sub.Recv(); status.Code(err) != codes.InvalidArgument {
		t.Errorf("subscription that begins with an ack: %v, want InvalidArgument", err)
	}
}

func TestTheOperatorsSocket(t *testing.T) {
	var told []string
	r := newRig(t, newCA(t, td), func(c *ServerConfig) {
		c.OnToken = func(_ context.Context, agent spiffeid.ID, expires time.Time, by string) error {
			told = append(told, fmt.Sprint(agent.Path(), " ", expires.Unix(), " ", by))
			if agent == agentID("unrecorded") {
				return errBroken
			}
			return nil
		}
	})
	c, _ := r.joined("node-a")
	a := r.admin()
	ctx := t.Context()
	tok, err := a.CreateJoinToken(ctx, "node-z", 0)
	if err != nil || tok.Value != "token-of-node-z" || tok.Agent != agentID("node-z") || !tok.Expires.Equal(time.Unix(1e9, 0).Add(defaultTokenTTL)) {
		t.Errorf("token %+v, %v", tok, err)
	}
	if want := []string{fmt.Sprintf("/spire/agent/join_token/node-z 1000000600 uid %d pid %d", os.Geteuid(), os.Getpid())}; !slices.Equal(told, want) {
		t.Errorf("told %q, want %q", told, want)
	}
	if tok, err := a.CreateJoinToken(ctx, "unrecorded", 0); err == nil {
		t.Errorf("a token that was not recorded was given out: %+v", tok)
	}
	for _, name := range []string{"", "a/b", "..", "a b"} {
		if _, err := a.CreateJoinToken(ctx, name, time.Minute); !errors.Is(err, ErrRefused) {
			t.Errorf("token for %q: %v, want ErrRefused", name, err)
		}
	}
	if _, err := a.CreateJoinToken(ctx, "n", 25*time.Hour); !errors.Is(err, ErrRefused) {
		t.Errorf("token for 25 h: %v, want ErrRefused", err)
	}
	agents, err := a.Agents(ctx)
	if err != nil || len(agents) != 1 || agents[0].ID != agentID("node-a") {
		t.Errorf("agents %+v, %v", agents, err)
	}
	entries, err := a.Entries(ctx)
	if err != nil || len(entries) != 3 {
		t.Errorf("%d entries, %v", len(entries), err)
	}
	if st, err := a.Status(ctx); err != nil || st != r.reg.Status() {
		if !st.Started.Equal(r.reg.Status().Started) || err != nil {
			t.Errorf("status %+v, %v", st, err)
		}
	}
	p := mesh.Proxy{Agent: agentID("node-a"), Workload: payment, Kind: KindSidecar, State: mesh.Synced, PolicyRevision: 3, Connected: true, LastSeen: time.Unix(1e9, 0).UTC(), SVIDExpires: time.Unix(2e9, 0).UTC()}
	r.reg.ReportProxy(p)
	if got, err := a.Proxies(ctx); err != nil || len(got) != 1 || got[0] != p {
		t.Errorf("proxies %+v, %v", got, err)
	}
	if err := c.ReportEdges(ctx, []mesh.Edge{{Src: payment.String(), Dst: billing.String(), Allowed: 1}}); err != nil {
		t.Fatal(err)
	}
	if got, err := a.Edges(ctx, time.Time{}, time.Time{}); err != nil || len(got.Edges) != 1 || got.Edges[0].Allowed != 1 || got.To.Sub(got.From) != time.Hour || len(got.Unused) != 1 {
		t.Errorf("edges %+v, %v", got, err)
	}
	spire := agentv1.NewAgentClient(a.cc)
	jt, err := spire.CreateJoinToken(ctx, &agentv1.CreateJoinTokenRequest{Ttl: 60, AgentId: idToWire(agentID("node-y"))})
	if err != nil || jt.Value != "token-of-node-y" {
		t.Errorf("SPIRE's token %v, %v", jt, err)
	}
	for name, req := range map[string]*agentv1.CreateJoinTokenRequest{
		"a chosen value": {Ttl: 60, Token: "secret"},
		"a workload":     {Ttl: 60, AgentId: idToWire(payment)},
		"no time":        {Ttl: -1},
	} {
		if _, err := spire.CreateJoinToken(ctx, req); status.Code(err) != codes.InvalidArgument {
			t.Errorf("SPIRE's token with %s: %v, want InvalidArgument", name, err)
		}
	}
	absent, err := DialAdmin(t.TempDir() + "/none")
	if err != nil {
		t.Fatal(err)
	}
	defer absent.Close()
	if _, err := absent.Status(ctx); !errors.Is(err, ErrUnreachable) || !strings.Contains(err.Error(), "check that") {
		t.Errorf("no socket: %v, want ErrUnreachable with a next step", err)
	}
}

func TestServerConfigNamesEveryMistake(t *testing.T) {
	_, err := NewServer(ServerConfig{StreamsPerAgent: -1, AttestsAtOnce: -1})
	for _, field := range []string{"trust_domain", "registry", "authority", "audit", "log", "streams_per_agent", "attests_at_once"} {
		if err == nil || !strings.Contains(err.Error(), field) {
			t.Errorf("error lacks %s: %v", field, err)
		}
	}
	_, err = Dial(ClientConfig{Addresses: []string{"nope"}})
	for _, field := range []string{"addresses", "trust_domain", "bundle", "identity", "log"} {
		if err == nil || !strings.Contains(err.Error(), field) {
			t.Errorf("error lacks %s: %v", field, err)
		}
	}
}
