package svid

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"sallyport/internal/mesh"
)

// revocationOf is a revocation of what a source shows.
func revocationOf(s *Source) mesh.RevokedSVID {
	leaf := s.Current().Identities[0].Chain[0]
	return mesh.RevokedSVID{Serial: mesh.SerialText(leaf.SerialNumber), Until: leaf.NotAfter, Why: mesh.WhyRevoked}
}

func TestARevokedPeerIsRefused(t *testing.T) {
	ca := newCA(t, td)
	for _, end := range []string{"client", "server"} {
		billing, payment := ca.source(id("/billing")), ca.source(id("/payment"))
		cs, ss, cerr, serr := shake(t, ServerTLS(billing, anybody), ClientTLS(payment, id("/billing")))
		if cerr != nil || serr != nil || billing.Standing(ss) != nil || payment.Standing(cs) != nil {
			t.Fatal(cerr, serr, billing.Standing(ss), payment.Standing(cs))
		}
		judge, state := billing, ss
		r := revocationOf(payment)
		if end == "server" {
			judge, state, r = payment, cs, revocationOf(billing)
		}
		if !judge.Revoke([]mesh.RevokedSVID{r}) || judge.Revoke([]mesh.RevokedSVID{r}) {
			t.Errorf("%s: a revocation is news once", end)
		}
		if err := judge.Standing(state); !errors.Is(err, ErrRevoked) {
			t.Errorf("%s: a connection that is open stands: %v", end, err)
		}
		_, _, cerr, serr = shake(t, ServerTLS(billing, anybody), ClientTLS(payment, id("/billing")))
		if own := map[string]error{"client": serr, "server": cerr}[end]; !errors.Is(own, ErrRevoked) {
			t.Errorf("%s: a new handshake: %v, %v", end, cerr, serr)
		}
	}
}

func TestARevokedSVIDOfOursIsNotShown(t *testing.T) {
	s := newCA(t, td).source(id("/billing"))
	s.Revoke([]mesh.RevokedSVID{revocationOf(s)})
	if !s.HoldsRevoked() {
		t.Error("it does not know that its own is revoked")
	}
	if _, err := s.Certificate(); !errors.Is(err, ErrRevoked) {
		t.Errorf("got %v, want ErrRevoked", err)
	}
}

func TestStandingSeesTheEnd(t *testing.T) {
	ca := newCA(t, td)
	billing, payment := ca.source(id("/billing")), ca.source(id("/payment"))
	_, ss, cerr, serr := shake(t, ServerTLS(billing, anybody), ClientTLS(payment, id("/billing")))
	if cerr != nil || serr != nil {
		t.Fatal(cerr, serr)
	}
	end := ss.PeerCertificates[0].NotAfter.Add(mesh.Grace)
	billing.now = func() time.Time { return end.Add(-time.Second) }
	if err := billing.Standing(ss); err != nil {
		t.Errorf("within the grace: %v", err)
	}
	billing.now = func() time.Time { return end }
	if err := billing.Standing(ss); !errors.Is(err, ErrExpired) {
		t.Errorf("got %v, want ErrExpired", err)
	}
	ss.PeerCertificates = nil
	if billing.Standing(ss) == nil {
		t.Error("a peer without a certificate stands")
	}
}

func TestRevocationsAreKeptALittleLongerThanTheirSVID(t *testing.T) {
	s, now := NewSource(), time.Now()
	s.now = func() time.Time { return now }
	first := mesh.RevokedSVID{Serial: "a", Until: now.Add(time.Minute), Why: mesh.WhyBanned}
	late := mesh.RevokedSVID{Serial: "b", Until: now.Add(time.Hour + 2*keepRevoked), Why: mesh.WhyBanned}
	past := mesh.RevokedSVID{Serial: "c", Until: now.Add(-keepRevoked), Why: mesh.WhyBanned}
	if !s.Revoke([]mesh.RevokedSVID{first, past}) || len(s.Revoked()) != 1 {
		t.Errorf("kept %+v", s.Revoked())
	}
	now = now.Add(time.Minute + keepRevoked)
	if !s.Revoke([]mesh.RevokedSVID{late}) || len(s.Revoked()) != 1 || s.Revoked()[0].Serial != "b" {
		t.Errorf("kept %+v, want what has not ended", s.Revoked())
	}
}

func TestRotatorReplacesARevokedSVID(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newIssuer(t, time.Hour, "a")
		s, r := rotate(t, f, nil)
		old := s.Current().Identities[0].Chain[0]
		s.Revoke([]mesh.RevokedSVID{revocationOf(s)})
		r.Sync()
		synctest.Wait()
		if now := s.Current().Identities; len(now) != 1 || now[0].Chain[0].Equal(old) || f.count("a") != 2 {
			t.Errorf("%d SVIDs minted, holds %v", f.count("a"), ids(s))
		}
		f.set(func() { f.down = errors.New("down") })
		s.Revoke([]mesh.RevokedSVID{revocationOf(s)})
		r.Sync()
		synctest.Wait()
		if len(ids(s)) != 0 {
			t.Error("a revoked SVID is held on to while no issuer answers")
		}
	})
}
