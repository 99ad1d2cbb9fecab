package control

import (
	"crypto/x509"
	"encoding/asn1"
	"log/slog"
	"math/big"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// refusedInWords holds a refusal of what somebody gave to its form.
func refusedInWords(t *testing.T, err error) {
	t.Helper()
	if st := status.Convert(err); st.Code() != codes.InvalidArgument || st.Message() == "" || len(st.Message()) > 4096 {
		t.Fatalf("refused with %s %.200q", st.Code(), st.Message())
	}
}

// checkGiven holds an accepted bundle to what others rely on: something is in
// it, every certificate is an authority's, and it can be sent.
func checkGiven(t *testing.T, b FederatedBundle) {
	t.Helper()
	if n := len(b.X509) + len(b.JWT); n == 0 || n > maxGiven {
		t.Fatalf("accepted %d authorities", n)
	}
	for _, c := range b.X509 {
		if !c.IsCA {
			t.Fatal("accepted a leaf")
		}
	}
	ids := map[string]bool{}
	for _, k := range b.JWT {
		if k.KeyID == "" || len(k.KeyID) > maxKeyID || ids[k.KeyID] {
			t.Fatalf("accepted key ID %.300q", k.KeyID)
		}
		ids[k.KeyID] = true
	}
	if _, err := jwtKeysToWire(b.JWT); err != nil {
		t.Fatalf("accepted what cannot be sent: %v", err)
	}
	if b.RefreshHint < 0 || b.RefreshHint > 24*time.Hour {
		t.Fatalf("accepted refresh hint %s", b.RefreshHint)
	}
}

func FuzzGivenBundle(f *testing.F) {
	far := spiffeid.RequireTrustDomainFromString("far.example")
	a := newCA(f, far)
	keys, err := jwtKeysToWire(a.JWTKeys())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(wire(f, &types.Bundle{TrustDomain: "far.example", X509Authorities: []*types.X509Certificate{{Asn1: a.root.Raw}}, JwtAuthorities: keys, RefreshHint: 60, SequenceNumber: 2}))
	f.Add(wire(f, &types.Bundle{JwtAuthorities: append(keys, keys...), RefreshHint: -1}))
	f.Add(wire(f, &types.Bundle{TrustDomain: "corp.example"}))
	f.Add(wire(f, &types.Bundle{JwtAuthorities: []*types.JWTKey{{KeyId: "dsa", PublicKey: dsaKey(f)}}}))
	f.Fuzz(func(t *testing.T, in []byte) {
		var w types.Bundle
		if proto.Unmarshal(in, &w) != nil {
			return
		}
		b, err := givenBundle(&w, far)
		if err != nil {
			refusedInWords(t, err)
			return
		}
		if w.GetTrustDomain() != "" && w.GetTrustDomain() != "far.example" {
			t.Fatalf("accepted a bundle of %q", w.GetTrustDomain())
		}
		checkGiven(t, b)
	})
}

// dsaKey is a key that crypto/x509 reads and does not write.
func dsaKey(f *testing.F) []byte {
	f.Helper()
	number, err := asn1.Marshal(big.NewInt(7))
	if err != nil {
		f.Fatal(err)
	}
	params, err := asn1.Marshal(struct{ P, Q, G *big.Int }{big.NewInt(23), big.NewInt(11), big.NewInt(4)})
	if err != nil {
		f.Fatal(err)
	}
	type algorithm struct {
		ID         asn1.ObjectIdentifier
		Parameters asn1.RawValue
	}
	der, err := asn1.Marshal(struct {
		Algorithm algorithm
		Key       asn1.BitString
	}{algorithm{asn1.ObjectIdentifier{1, 2, 840, 10040, 4, 1}, asn1.RawValue{FullBytes: params}}, asn1.BitString{Bytes: number, BitLength: 8 * len(number)}})
	if err != nil {
		f.Fatal(err)
	}
	if _, err := x509.ParsePKIXPublicKey(der); err != nil {
		f.Fatal(err)
	}
	return der
}

func FuzzDownstreamJWTKey(f *testing.F) {
	now := time.Unix(1_800_000_000, 0)
	s := &Server{cfg: ServerConfig{TrustDomain: td, Log: slog.New(slog.DiscardHandler), Now: func() time.Time { return now }}}
	keys, err := jwtKeysToWire(newCA(f, td).JWTKeys())
	if err != nil {
		f.Fatal(err)
	}
	for _, ends := range []int64{0, -1, now.Unix(), now.Unix() + 60, now.Add(maxKeyLife).Unix() + 1, 1<<63 - 1} {
		keys[0].ExpiresAt = ends
		f.Add(wire(f, keys[0]))
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		var w types.JWTKey
		if proto.Unmarshal(in, &w) != nil {
			return
		}
		k, err := s.downstreamJWTKey(&w)
		if err != nil {
			refusedInWords(t, err)
			return
		}
		if k.KeyID == "" || len(k.KeyID) > maxKeyID || plain(k.KeyID) != k.KeyID {
			t.Fatalf("accepted key ID %.300q", k.KeyID)
		}
		if !k.ExpiresAt.After(now) || k.ExpiresAt.After(now.Add(maxKeyLife)) {
			t.Fatalf("accepted a key until %s", k.ExpiresAt)
		}
		if err := checkKey(k.PublicKey); err != nil {
			t.Fatalf("accepted a key that %v", err)
		}
		if _, err := x509.MarshalPKIXPublicKey(k.PublicKey); err != nil {
			t.Fatalf("accepted what cannot be sent: %v", err)
		}
	})
}

// FuzzFederationPut reads relationships, with every mask, into one that exists.
func FuzzFederationPut(f *testing.F) {
	far := spiffeid.RequireTrustDomainFromString("far.example")
	a := newCA(f, far)
	f.Add(wire(f, &types.FederationRelationship{
		TrustDomain: "far.example", BundleEndpointUrl: "https://far.example:8444",
		BundleEndpointProfile: &types.FederationRelationship_HttpsSpiffe{HttpsSpiffe: &types.HTTPSSPIFFEProfile{EndpointSpiffeId: "spiffe://far.example/spire/server"}},
		TrustDomainBundle:     &types.Bundle{X509Authorities: []*types.X509Certificate{{Asn1: a.root.Raw}}},
	}), byte(0xff))
	f.Add(wire(f, &types.FederationRelationship{BundleEndpointUrl: "x", BundleEndpointProfile: &types.FederationRelationship_HttpsWeb{}}), byte(0))
	f.Add(wire(f, &types.FederationRelationship{BundleEndpointProfile: &types.FederationRelationship_HttpsSpiffe{}}), byte(2))
	was := Federation{TrustDomain: far, URL: "https://was.example", Profile: profileSPIFFE, EndpointID: ServerID(far)}
	f.Fuzz(func(t *testing.T, in []byte, bits byte) {
		var w types.FederationRelationship
		if proto.Unmarshal(in, &w) != nil {
			return
		}
		var m *types.FederationRelationshipMask
		if bits != 0xff {
			m = &types.FederationRelationshipMask{BundleEndpointUrl: bits&1 != 0, BundleEndpointProfile: bits&2 != 0, TrustDomainBundle: bits&4 != 0}
		}
		got := was
		if err := (&trustDomainAPI{}).put(&got, &w, m); err != nil {
			refusedInWords(t, err)
			return
		}
		if got.TrustDomain != far || got.URL == "" || len(got.URL) > maxURL {
			t.Fatalf("made %s at %.300q", got.TrustDomain, got.URL)
		}
		if (got.Profile == profileSPIFFE) == got.EndpointID.IsZero() || got.Profile != profileSPIFFE && got.Profile != profileWeb {
			t.Fatalf("profile %q with endpoint ID %q", got.Profile, got.EndpointID)
		}
		if m != nil && (!m.BundleEndpointUrl && got.URL != was.URL || !m.TrustDomainBundle && got.Bundle != nil || !m.BundleEndpointProfile && got.Profile != was.Profile) {
			t.Fatalf("changed what the mask %v does not name", m)
		}
		if got.Bundle != nil {
			checkGiven(t, *got.Bundle)
		}
	})
}
