package control

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"sallyport/internal/mesh"
)

// below is a Downstream that signs with the rig's intermediate.
type below struct {
	*ca
	mu   sync.Mutex // guards what follows
	ttl  time.Duration
	keys []JWTKey
	fail error
}

func (b *below) SignDownstream(_ context.Context, id spiffeid.ID, key crypto.PublicKey, ttl time.Duration) ([]*x509.Certificate, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.ttl = ttl; b.fail != nil {
		return nil, b.fail
	}
	der, err := x509.CreateCertificate(rand.Reader, asCA(template(b.nextSerial(), nil, time.Hour)), b.mid, key, b.midKey)
	if err != nil {
		return nil, err
	}
	c, err := x509.ParseCertificate(der)
	return []*x509.Certificate{c, b.mid}, err
}

func (b *below) PublishJWTKey(_ context.Context, id spiffeid.ID, k JWTKey) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if k.KeyID == "taken" {
		return mesh.ErrExists
	}
	b.keys = append(b.keys, k)
	return b.fail
}

func TestADownstreamIssuerIsCertified(t *testing.T) {
	seen := &calls{}
	var b *below
	r := manageRig(t, func(c *ServerConfig) {
		b = &below{ca: c.Authority.(*ca)}
		c.Downstream, c.OnAdmin = b, seen.note
	})
	svids := svidv1.NewSVIDClient(r.as(down))
	key := newKey(t)
	resp, err := svids.NewDownstreamX509CA(t.Context(), &svidv1.NewDownstreamX509CARequest{Csr: csr(t, key), PreferredTtl: 1800})
	if err != nil {
		t.Fatal(err)
	}
	if len(resp.CaCertChain) != 2 || len(resp.X509Authorities) != 1 || string(resp.X509Authorities[0]) != string(r.ca.root.Raw) {
		t.Fatalf("%d certificates, %d authorities", len(resp.CaCertChain), len(resp.X509Authorities))
	}
	cert, err := x509.ParseCertificate(resp.CaCertChain[0])
	if err != nil || !key.PublicKey.Equal(cert.PublicKey) {
		t.Errorf("it does not certify the key: %v", err)
	}
	if b.ttl != 30*time.Minute {
		t.Errorf("a life of %s was asked for", b.ttl)
	}
	if n := len(seen.all); n != 1 || seen.all[0].Caller != down || seen.all[0].Method != "svid.NewDownstreamX509CA" || !seen.all[0].Allowed {
		t.Errorf("audit has %+v", seen.all)
	}

	for name, tc := range map[string]struct {
		req  *svidv1.NewDownstreamX509CARequest
		fail error
		code codes.Code
		want string
	}{
		"no request":             {&svidv1.NewDownstreamX509CARequest{}, nil, codes.InvalidArgument, "csr: certificate request is missing"},
		"a negative life":        {&svidv1.NewDownstreamX509CARequest{Csr: csr(t, key), PreferredTtl: -1}, nil, codes.InvalidArgument, "preferred_ttl"},
		"a refusal of the CA":    {&svidv1.NewDownstreamX509CARequest{Csr: csr(t, key)}, Unready(errors.New("no room below")), codes.FailedPrecondition, "no room below"},
		"a failure of the CA":    {&svidv1.NewDownstreamX509CARequest{Csr: csr(t, key)}, errBroken, codes.Internal, "internal"},
		"a request of other key": {&svidv1.NewDownstreamX509CARequest{Csr: spoilt(t)}, nil, codes.InvalidArgument, "not signed by its own key"},
	} {
		t.Run(name, func(t *testing.T) {
			b.mu.Lock()
			b.fail = tc.fail
			b.mu.Unlock()
			_, err := svids.NewDownstreamX509CA(t.Context(), tc.req)
			if status.Code(err) != tc.code || !strings.Contains(status.Convert(err).Message(), tc.want) {
				t.Errorf("got %v, want %s with %q", err, tc.code, tc.want)
			}
		})
	}
}

// spoilt is a certificate request whose signature is of another key.
func spoilt(t *testing.T) []byte {
	der := csr(t, newKey(t))
	der[len(der)-1] ^= 1
	return der
}

// TestADownstreamIssuerThatIsNoMore has no rights once its entry is gone or over.
func TestADownstreamIssuerThatIsNoMore(t *testing.T) {
	r := manageRig(t, func(c *ServerConfig) { c.Downstream = &below{ca: c.Authority.(*ca)} })
	svids := svidv1.NewSVIDClient(r.as(down))
	ask := func() codes.Code {
		_, err := svids.NewDownstreamX509CA(t.Context(), &svidv1.NewDownstreamX509CARequest{Csr: csr(t, newKey(t))})
		return status.Code(err)
	}
	if got := ask(); got != codes.OK {
		t.Fatalf("while it has an entry: %s", got)
	}
	r.reg.change(func() {
		for i, e := range r.reg.entries {
			if e.SPIFFEID == down {
				r.reg.entries[i].ExpiresAt = time.Now().Add(-time.Second)
			}
		}
	})
	if got := ask(); got != codes.PermissionDenied {
		t.Errorf("after its entry is over: %s", got)
	}
}

func TestAKeyOfADownstreamIssuerIsPublished(t *testing.T) {
	var b *below
	r := manageRig(t, func(c *ServerConfig) {
		b = &below{ca: c.Authority.(*ca)}
		c.Downstream = b
	})
	bundles := bundlev1.NewBundleClient(r.as(down))
	pkix := func(k crypto.PublicKey) []byte {
		der, err := x509.MarshalPKIXPublicKey(k)
		if err != nil {
			t.Fatal(err)
		}
		return der
	}
	good, soon := pkix(newKey(t).Public()), time.Now().Add(time.Hour).Unix()
	p224, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		key  *types.JWTKey
		code codes.Code
		want string
	}{
		"a good one":             {&types.JWTKey{KeyId: "d1", PublicKey: good, ExpiresAt: soon}, codes.OK, ""},
		"nothing":                {nil, codes.InvalidArgument, "key_id"},
		"a line feed in the ID":  {&types.JWTKey{KeyId: "a\nb", PublicKey: good, ExpiresAt: soon}, codes.InvalidArgument, "key_id"},
		"a long ID":              {&types.JWTKey{KeyId: strings.Repeat("x", 129), PublicKey: good, ExpiresAt: soon}, codes.InvalidArgument, "key_id"},
		"another's ID":           {&types.JWTKey{KeyId: "taken", PublicKey: good, ExpiresAt: soon}, codes.AlreadyExists, "ID of another key"},
		"no key":                 {&types.JWTKey{KeyId: "d2", ExpiresAt: soon}, codes.InvalidArgument, "public_key"},
		"half a key":             {&types.JWTKey{KeyId: "d2", PublicKey: good[:40], ExpiresAt: soon}, codes.InvalidArgument, "public_key"},
		"a weak key":             {&types.JWTKey{KeyId: "d2", PublicKey: pkix(p224.Public()), ExpiresAt: soon}, codes.InvalidArgument, "P-224"},
		"a huge key":             {&types.JWTKey{KeyId: "d2", PublicKey: make([]byte, maxCSR+1), ExpiresAt: soon}, codes.InvalidArgument, "at most"},
		"no end":                 {&types.JWTKey{KeyId: "d2", PublicKey: good}, codes.InvalidArgument, "expires_at"},
		"an end in the past":     {&types.JWTKey{KeyId: "d2", PublicKey: good, ExpiresAt: 1}, codes.InvalidArgument, "expires_at"},
		"an end too far in time": {&types.JWTKey{KeyId: "d2", PublicKey: good, ExpiresAt: 1 << 62}, codes.InvalidArgument, "expires_at"},
	} {
		t.Run(name, func(t *testing.T) {
			resp, err := bundles.PublishJWTAuthority(t.Context(), &bundlev1.PublishJWTAuthorityRequest{JwtAuthority: tc.key})
			if status.Code(err) != tc.code || !strings.Contains(status.Convert(err).Message(), tc.want) {
				t.Errorf("got %v, want %s with %q", err, tc.code, tc.want)
			}
			if err == nil && len(resp.JwtAuthorities) != 1 {
				t.Errorf("%d authorities in the answer", len(resp.JwtAuthorities))
			}
		})
	}
	if len(b.keys) != 1 || b.keys[0].KeyID != "d1" || b.keys[0].ExpiresAt.Unix() != soon {
		t.Errorf("published are %+v", b.keys)
	}
}

// csr is a request for key that names nobody.
func csr(t testing.TB, key *ecdsa.PrivateKey) []byte {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}
