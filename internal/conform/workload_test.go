package conform

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// A brokenAPI is a Workload API that is wrong in nearly everything.
type brokenAPI struct {
	workload.UnimplementedSpiffeWorkloadAPIServer
	own, other *Domain
}

func (b *brokenAPI) FetchX509SVID(_ *workload.X509SVIDRequest, s grpc.ServerStreamingServer[workload.X509SVIDResponse]) error {
	key, err := newKey()
	if err != nil {
		return err
	}
	other, err := newKey()
	if err != nil {
		return err
	}
	tpl := b.own.leaf(b.own.id("/a"), b.own.id("/b"))
	tpl.KeyUsage = x509.KeyUsageKeyEncipherment | x509.KeyUsageCertSign
	tpl.ExtKeyUsage = tpl.ExtKeyUsage[:1]
	leaf, err := b.own.sign(tpl, b.own.root, key.Public(), b.own.key)
	if err != nil {
		return err
	}
	der, err := x509.MarshalPKCS8PrivateKey(other)
	if err != nil {
		return err
	}
	one := func() *workload.X509SVID {
		return &workload.X509SVID{SpiffeId: b.own.id("/a"), X509Svid: leaf.Raw, X509SvidKey: der, Bundle: b.own.root.Raw, Hint: "same"}
	}
	return s.Send(&workload.X509SVIDResponse{Svids: []*workload.X509SVID{one(), one()}})
}

// FetchX509Bundles merges the bundles of two trust domains.
func (b *brokenAPI) FetchX509Bundles(_ *workload.X509BundlesRequest, s grpc.ServerStreamingServer[workload.X509BundlesResponse]) error {
	both := slices.Concat(b.own.root.Raw, b.other.root.Raw)
	return s.Send(&workload.X509BundlesResponse{Bundles: map[string][]byte{b.own.td.IDString(): both, b.other.td.IDString(): both}})
}

// FetchJWTBundles gives keys of every use.
func (b *brokenAPI) FetchJWTBundles(_ *workload.JWTBundlesRequest, s grpc.ServerStreamingServer[workload.JWTBundlesResponse]) error {
	return s.Send(&workload.JWTBundlesResponse{Bundles: map[string][]byte{b.own.td.IDString(): b.own.document(nil), b.other.td.IDString(): b.other.document(nil)}})
}

// FetchJWTSVID signs whatever it is asked for, for nobody and for ever.
func (b *brokenAPI) FetchJWTSVID(context.Context, *workload.JWTSVIDRequest) (*workload.JWTSVIDResponse, error) {
	f := &forger{d: b.own}
	t := f.es(map[string]any{"typ": "corp", "kid": nil, "jku": "https://x"}, map[string]any{"sub": "a", "aud": nil, "exp": nil})
	return &workload.JWTSVIDResponse{Svids: []*workload.JWTSVID{{SpiffeId: "spiffe://CORP.example/x?y", Svid: t}}}, f.err
}

// ValidateJWTSVID believes everything that can be read.
func (b *brokenAPI) ValidateJWTSVID(_ context.Context, r *workload.ValidateJWTSVIDRequest) (*workload.ValidateJWTSVIDResponse, error) {
	id := b.other.id("/conform")
	if t, err := readToken(r.Svid); err == nil && t.claims["sub"] != nil {
		id = fmt.Sprint(t.claims["sub"])
	}
	return &workload.ValidateJWTSVIDResponse{SpiffeId: id}, nil
}

// FetchWITSVID offers a profile and keeps none of its rules.
func (b *brokenAPI) FetchWITSVID(_ *workload.WITSVIDRequest, s grpc.ServerStreamingServer[workload.WITSVIDResponse]) error {
	f := &forger{d: b.own}
	t := f.es(map[string]any{"alg": "EdDSA"}, map[string]any{"exp": nil})
	return s.Send(&workload.WITSVIDResponse{Svids: []*workload.WITSVID{{SpiffeId: b.own.id("/a"), WitSvid: t}}})
}

func (b *brokenAPI) FetchWITBundles(_ *workload.WITBundlesRequest, s grpc.ServerStreamingServer[workload.WITBundlesResponse]) error {
	return s.Send(&workload.WITBundlesResponse{Bundles: map[string]string{b.own.td.IDString(): string(b.own.document(nil))}})
}

// TestABrokenWorkloadAPIIsFound sees nearly every demand on a Workload API not
// met, and each said under its own number.
func TestABrokenWorkloadAPIIsFound(t *testing.T) {
	own, err := quickDomain(spiffeid.RequireTrustDomainFromString("corp.example"))
	if err != nil {
		t.Fatal(err)
	}
	other := newDomain(t)
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	workload.RegisterSpiffeWorkloadAPIServer(s, &brokenAPI{own: own, other: other})
	go s.Serve(l) //nolint:errcheck // ends with Stop
	t.Cleanup(s.Stop)
	got, err := RunWorkload(t.Context(), Workload{Address: l.Addr().String(), Domain: other})
	if err != nil {
		t.Fatal(err)
	}
	for _, must := range []int{
		1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 16, 17, 26, 27, 28, 40, 41, 43, 44, 45, 46, 47, 48, 49, 50, 51, 53, 54, 55,
		57, 58, 59, 60, 61, 63, 66, 70, 82, 86, 98, 105, 111, 113, 114, 116, 117, 118,
	} {
		if v := got[must-1]; v.Err == nil {
			t.Errorf("%d %s: not found (%d looks) %s", must, v.Must.Says, v.Looks, v.Skipped)
		}
	}
	if v := got[118]; v.Skipped == "" || v.Err != nil {
		t.Errorf("119: %v, though WIT-SVIDs are offered", v.Err)
	}
}

// An emptyAPI has an identity to give and says nothing else.
type emptyAPI struct {
	workload.UnimplementedSpiffeWorkloadAPIServer
}

func (emptyAPI) FetchX509SVID(_ *workload.X509SVIDRequest, s grpc.ServerStreamingServer[workload.X509SVIDResponse]) error {
	return s.Send(&workload.X509SVIDResponse{})
}

func (emptyAPI) FetchX509Bundles(_ *workload.X509BundlesRequest, s grpc.ServerStreamingServer[workload.X509BundlesResponse]) error {
	return s.Send(&workload.X509BundlesResponse{})
}

func (emptyAPI) FetchWITSVID(*workload.WITSVIDRequest, grpc.ServerStreamingServer[workload.WITSVIDResponse]) error {
	return status.Error(codes.PermissionDenied, "no")
}

func TestAnEmptyWorkloadAPIIsFound(t *testing.T) {
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	workload.RegisterSpiffeWorkloadAPIServer(s, emptyAPI{})
	go s.Serve(l) //nolint:errcheck // ends with Stop
	t.Cleanup(s.Stop)
	got, err := RunWorkload(t.Context(), Workload{Address: l.Addr().String()})
	if err != nil {
		t.Fatal(err)
	}
	for _, must := range []int{98, 105, 110, 112, 115, 119} {
		if got[must-1].Err == nil {
			t.Errorf("%d %s: not found: %s", must, got[must-1].Must.Says, got[must-1].Skipped)
		}
	}
}

// TestADomainIsKeptWhole reads back what was written, and finds what is not.
func TestADomainIsKeptWhole(t *testing.T) {
	d, dir := newDomain(t), filepath.Join(t.TempDir(), "d")
	if err := d.Save(dir); err != nil {
		t.Fatal(err)
	}
	got, err := LoadDomain(dir)
	if err != nil {
		t.Fatal(err)
	}
	if got.td != d.td || !got.root.Equal(d.root) || !got.key.Equal(d.key) || string(got.document(nil)) != string(d.document(nil)) {
		t.Error("what was read is not what was written")
	}
	var doc map[string][]map[string]any
	if err := json.Unmarshal(d.document(func(m map[string]any) { delete(m, "spiffe_sequence"); delete(m, "spiffe_refresh_hint") }), &doc); err != nil {
		t.Fatal(err)
	}
	for _, k := range doc["keys"] {
		if k["d"] != nil || k["p"] != nil {
			t.Errorf("the bundle has a private key: %v", k["kid"])
		}
	}
	if err := d.Save(dir); err == nil || !strings.Contains(err.Error(), "exists") {
		t.Errorf("a second trust domain replaced the first: %v", err)
	}
}
