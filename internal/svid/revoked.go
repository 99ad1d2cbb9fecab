package svid

import (
	"cmp"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"sallyport/internal/mesh"
)

// ErrRevoked says that an SVID was revoked before its end.
var ErrRevoked = errors.New("SVID is revoked")

// keepRevoked is how long a revocation is kept after the last tunnel of its SVID
// has ended, so that a clock that is set back does not bring the SVID back.
const keepRevoked = time.Hour

// Revoke adds to the X.509-SVIDs of the own trust domain that are believed no
// more, by serial number, and reports whether there was any news. What has
// ended by itself is let go.
func (s *Source) Revoke(list []mesh.RevokedSVID) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	now, news := s.now(), false
	next := map[string]mesh.RevokedSVID{}
	if old := s.revoked.Load(); old != nil {
		next = maps.Clone(*old)
	}
	for _, r := range list {
		if _, known := next[r.Serial]; !known && now.Before(r.Until.Add(keepRevoked)) {
			next[r.Serial], news = r, true
		}
	}
	if !news {
		return false
	}
	maps.DeleteFunc(next, func(_ string, r mesh.RevokedSVID) bool { return !now.Before(r.Until.Add(keepRevoked)) })
	s.revoked.Store(&next)
	return true
}

// Revoked are the revocations in force, by serial number.
func (s *Source) Revoked() []mesh.RevokedSVID {
	m := s.revoked.Load()
	if m == nil {
		return nil
	}
	return slices.SortedFunc(maps.Values(*m), func(a, b mesh.RevokedSVID) int { return cmp.Compare(a.Serial, b.Serial) })
}

// checkRevoked is an ErrRevoked when a leaf was revoked.
func (s *Source) checkRevoked(leaf *x509.Certificate) error {
	m := s.revoked.Load()
	if m == nil || len(*m) == 0 {
		return nil
	}
	if r, ok := (*m)[mesh.SerialText(leaf.SerialNumber)]; ok {
		return fmt.Errorf("%w (serial %s, %s)", ErrRevoked, r.Serial, r.Why)
	}
	return nil
}

// HoldsRevoked says whether an identity of the current state was revoked.
func (s *Source) HoldsRevoked() bool {
	st := s.Current()
	return st != nil && slices.ContainsFunc(st.Identities, func(i Identity) bool { return s.checkRevoked(i.Chain[0]) != nil })
}

// Standing looks again at what the peer of a connection has proved in its
// handshake: an error wraps ErrRevoked, or ErrExpired when the SVID has ended and
// so has mesh.Grace. It checks no signature, so that many connections can be
// looked at at once.
func (s *Source) Standing(cs tls.ConnectionState) error {
	if len(cs.PeerCertificates) == 0 {
		return errors.New("peer has shown no certificate")
	}
	if err := s.checkRevoked(cs.PeerCertificates[0]); err != nil {
		return err
	}
	now := s.now()
	for _, c := range cs.PeerCertificates {
		if !now.Before(c.NotAfter.Add(mesh.Grace)) {
			return fmt.Errorf("%w (valid until %s)", ErrExpired, c.NotAfter.UTC().Format(time.RFC3339))
		}
	}
	return nil
}
