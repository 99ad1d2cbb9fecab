package control

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/protobuf/proto"

	"sallyport/internal/control/meshpb"
	"sallyport/internal/mesh"
)

// wire encodes a seed.
func wire(f *testing.F, m proto.Message) []byte {
	f.Helper()
	b, err := proto.Marshal(m)
	if err != nil {
		f.Fatal(err)
	}
	return b
}

// keeper is a Handler that keeps what it is told.
type keeper struct {
	last    *mesh.Snapshot
	revoked []mesh.RevokedSVID
}

func (k *keeper) OnSnapshot(_ context.Context, s *mesh.Snapshot) error { k.last = s; return nil }
func (k *keeper) OnCandidate(context.Context, *mesh.Snapshot) error    { return nil }

func (k *keeper) OnSyncNow(context.Context)                            {}
func (k *keeper) OnRevoked(_ context.Context, list []mesh.RevokedSVID) { k.revoked = list }

// FuzzSubscriber feeds a subscriber what an issuer might say. It never puts in
// force what its hash does not cover, an answer always names what was told, and
// nothing is confirmed as revoked beside what was not understood.
func FuzzSubscriber(f *testing.F) {
	snap := snapshot(f, 10, 3, "GET")
	var own projection
	if err := own.project(snap, projectionKey{kind: KindSidecar, workload: billing}); err != nil {
		f.Fatal(err)
	}
	m := own.msg
	f.Add(wire(f, &meshpb.SubscribeResponse{Message: &meshpb.SubscribeResponse_Snapshot{Snapshot: m}}),
		wire(f, &meshpb.SubscribeResponse{Message: &meshpb.SubscribeResponse_Same{Same: &meshpb.Same{Revision: 11, PolicyRevision: 4, PolicyHash: "x"}}}))
	f.Add(wire(f, &meshpb.SubscribeResponse{Message: &meshpb.SubscribeResponse_SyncNow{SyncNow: &meshpb.SyncNow{}}}), []byte{})
	f.Add(wire(f, &meshpb.SubscribeResponse{Message: &meshpb.SubscribeResponse_Revocations{Revocations: &meshpb.Revocations{
		Revision: 4, Revoked: []*meshpb.Revoked{{Serial: "ff", Until: timeToWire(time.Unix(4e9, 0)), Why: mesh.WhyBanned}},
	}}}), []byte{})
	vouched := proto.Clone(m).(*meshpb.Snapshot)
	vouched.PolicySet = "good"
	f.Add(wire(f, &meshpb.SubscribeResponse{Message: &meshpb.SubscribeResponse_Snapshot{Snapshot: vouched}}),
		wire(f, &meshpb.SubscribeResponse{Message: &meshpb.SubscribeResponse_Same{Same: &meshpb.Same{Revision: 11, PolicyRevision: 4, PolicySet: "bad"}}}))
	f.Fuzz(func(t *testing.T, first, second []byte) {
		for _, pins := range []bool{false, true} {
			feed(t, pins, first, second)
		}
	})
}

func feed(t *testing.T, pins bool, messages ...[]byte) {
	k := &keeper{}
	s := &subscriberState{hello: Hello{Kind: KindSidecar, Workload: billing}, handler: k}
	if pins {
		s.hello.Vouch = func(_ context.Context, set string, _ func() ([]byte, error)) error {
			switch set {
			case "good":
				return nil
			case "":
				return fmt.Errorf("%w: it is gone", ErrUnfetched)
			}
			return errors.New("nobody signed it")
		}
	}
	s.greeting()
	for _, b := range messages {
		var m meshpb.SubscribeResponse
		if proto.Unmarshal(b, &m) != nil {
			continue
		}
		before := s.revoked
		if err := s.distrust(t.Context(), m.GetRevocations()); err != nil && s.revoked != before {
			t.Fatalf("confirmed %d beside %v", s.revoked, err)
		}
		for _, r := range k.revoked {
			if err := r.Validate(); err != nil {
				t.Fatal(err)
			}
		}
		answer, err := s.take(t.Context(), &m)
		if err != nil && !pins {
			t.Fatalf("a stream without pins is ended: %v", err)
		}
		if err != nil {
			return
		}
		if pins && k.last != nil && k.last.PolicySet != "good" {
			t.Fatalf("put in force what set %q says", k.last.PolicySet)
		}
		if !answer {
			continue
		}
		a := s.answer()
		if a.GetAck().GetRevision()+a.GetNack().GetRevision() != s.told {
			t.Fatalf("answer %v to revision %d", a, s.told)
		}
		if a.GetAck() != nil && (k.last == nil || k.last.Revision != a.GetAck().GetRevision()) {
			t.Fatalf("acknowledged %d without putting it in force", a.GetAck().GetRevision())
		}
		if sn := m.GetSnapshot(); sn != nil && a.GetAck() != nil && k.last.ContentHash() != sn.GetHash() {
			t.Fatal("put in force what the hash does not cover")
		}
	}
}

// FuzzFromWire reads what a peer might send in every message that is decoded
// by hand. Nothing may panic, and what is accepted can be sent again.
func FuzzFromWire(f *testing.F) {
	a := newCA(f, td)
	cert := a.issue(f, payment, newKey(f))
	f.Add(wire(f, entryToWire(mesh.Entry{ID: "e", SPIFFEID: payment, ParentID: agentID("n"), Selectors: []mesh.Selector{{Type: "unix", Value: "uid:1"}}}, 4)))
	f.Add(wire(f, &types.X509SVID{Id: idToWire(payment), CertChain: cert.Certificate}))
	f.Add(wire(f, &types.Bundle{TrustDomain: td.Name(), X509Authorities: []*types.X509Certificate{{Asn1: a.root.Raw}}, RefreshHint: 60}))
	f.Add(wire(f, &meshpb.Endpoint{Service: "billing", Address: "127.0.0.1:15006"}))
	f.Add(wire(f, proxyToWire(mesh.Proxy{Agent: agentID("n"), Workload: payment, Kind: KindSidecar})))
	f.Add(wire(f, agentToWire(mesh.Agent{ID: agentID("n"), Serial: "12"})))
	csr, err := request(newKey(f))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(csr)
	f.Add(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.root.Raw}))
	f.Fuzz(func(t *testing.T, b []byte) {
		var entry types.Entry
		if proto.Unmarshal(b, &entry) == nil {
			if e, err := entryFromWire(&entry); err == nil {
				back, err := entryFromWire(entryToWire(e, 1))
				if err != nil || back.SPIFFEID != e.SPIFFEID || back.ParentID != e.ParentID {
					t.Fatalf("entry %+v came back as %+v, %v", e, back, err)
				}
			}
		}
		var svid types.X509SVID
		if proto.Unmarshal(b, &svid) == nil {
			if chain, err := chainFromWire(&svid, payment, cert.Leaf.PublicKey); err == nil && len(chain[0].URIs) != 1 {
				t.Fatal("accepted a leaf without exactly one identity")
			}
		}
		var bundle types.Bundle
		if proto.Unmarshal(b, &bundle) == nil {
			if got, err := bundleFromWire(&bundle, td); err == nil && len(got.X509) == 0 {
				t.Fatal("accepted a bundle without a root")
			}
		}
		var ep meshpb.Endpoint
		if proto.Unmarshal(b, &ep) == nil {
			if e, err := endpointFromWire(&ep, payment); err == nil && (!e.Address.IsValid() || e.Address.Port() == 0) {
				t.Fatalf("accepted endpoint %+v", e)
			}
		}
		var p meshpb.Proxy
		if proto.Unmarshal(b, &p) == nil {
			_, _ = proxyFromWire(&p)
		}
		var ag types.Agent
		if proto.Unmarshal(b, &ag) == nil {
			_, _ = agentFromWire(&ag)
		}
		if _, err := requestKey(b); err == nil {
			if _, err := x509.ParseCertificateRequest(b); err != nil {
				t.Fatal("accepted a request that does not parse")
			}
		}
		if roots, err := ParseBundle(b); err == nil && len(roots) == 0 {
			t.Fatal("accepted an empty bundle")
		}
		if text := plain(string(b)); len(text) > maxReason*3 || bytes.ContainsAny([]byte(text), "\n\r\x00\x7f") {
			t.Fatalf("not plain: %q", text)
		}
	})
}
