package svid

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/pem"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"
)

// sds connects as Envoy does: without the security header.
func (s served) sds(t *testing.T) (secretv3.SecretDiscoveryServiceClient, context.Context) {
	t.Helper()
	cc, err := grpc.NewClient("unix://"+s.path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cc.Close() })
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	t.Cleanup(cancel)
	return secretv3.NewSecretDiscoveryServiceClient(cc), ctx
}

func secrets(t *testing.T, r *discoveryv3.DiscoveryResponse) map[string]*tlsv3.Secret {
	t.Helper()
	out := map[string]*tlsv3.Secret{}
	for _, a := range r.Resources {
		var s tlsv3.Secret
		if err := a.UnmarshalTo(&s); err != nil {
			t.Fatal(err)
		}
		if err := s.ValidateAll(); err != nil {
			t.Errorf("%s is not valid to Envoy: %v", s.Name, err)
		}
		out[s.Name] = &s
	}
	return out
}

// trusts lists the trust domains of a validation context.
func trusts(t *testing.T, s *tlsv3.Secret) string {
	t.Helper()
	var conf tlsv3.SPIFFECertValidatorConfig
	custom := s.GetValidationContext().GetCustomValidatorConfig()
	if custom.GetName() != "envoy.tls.cert_validator.spiffe" {
		t.Fatalf("validator %q", custom.GetName())
	}
	if err := custom.TypedConfig.UnmarshalTo(&conf); err != nil {
		t.Fatal(err)
	}
	if err := conf.ValidateAll(); err != nil {
		t.Error(err)
	}
	var names []string
	for _, d := range conf.TrustDomains {
		names = append(names, d.Name)
		if b, _ := pem.Decode(d.TrustBundle.GetInlineBytes()); b == nil || b.Type != "CERTIFICATE" {
			t.Errorf("%s: bundle is not PEM", d.Name)
		}
	}
	return strings.Join(names, " ")
}

func federate(t *testing.T, s served) *testCA {
	t.Helper()
	far := newCA(t, spiffeid.RequireTrustDomainFromString("example.net"))
	st := *s.src.Current()
	st.Federated = map[spiffeid.TrustDomain]*x509bundle.Bundle{far.td: far.bundle()}
	st.Identities = slices.Clone(st.Identities)
	for i := range st.Identities {
		st.Identities[i].FederatesWith = []spiffeid.TrustDomain{far.td}
	}
	if err := s.src.Set(&st); err != nil {
		t.Fatal(err)
	}
	return far
}

func TestSDSNames(t *testing.T) {
	s := serve(t, entitled("entry/a", "entry/b"), nil, id("/a"), id("/b"), id("/c"))
	federate(t, s)
	c, ctx := s.sds(t)
	fetch := func(names ...string) map[string]*tlsv3.Secret {
		t.Helper()
		r, err := c.FetchSecrets(ctx, &discoveryv3.DiscoveryRequest{TypeUrl: secretType, ResourceNames: names})
		if err != nil {
			t.Fatalf("%v: %v", names, err)
		}
		if len(names) > 0 && len(r.Resources) != len(names) {
			t.Errorf("%v: %d resources", names, len(r.Resources))
		}
		return secrets(t, r)
	}
	for name, want := range map[string]string{"default": "/a", "spiffe://example.org/b": "/b"} {
		cert := fetch(name)[name].GetTlsCertificate()
		pair, err := tls.X509KeyPair(cert.GetCertificateChain().GetInlineBytes(), cert.GetPrivateKey().GetInlineBytes())
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if got, err := leafID(pair.Leaf); err != nil || got != id(want) || len(pair.Certificate) != 2 {
			t.Errorf("%s is %s with %d certificates, %v", name, got, len(pair.Certificate), err)
		}
	}
	for name, want := range map[string]string{
		"ROOTCA": "example.org", "spiffe://example.org": "example.org",
		"spiffe://example.net": "example.net", "ALL": "example.org example.net",
	} {
		if got := trusts(t, fetch(name)[name]); got != want {
			t.Errorf("%s trusts %q, want %q", name, got, want)
		}
	}
	all := fetch()
	for _, n := range []string{"spiffe://example.org", "spiffe://example.net", "spiffe://example.org/a", "spiffe://example.org/b"} {
		if all[n] == nil {
			t.Errorf("without names: %s is missing", n)
		}
	}
	if len(all) != 4 {
		t.Errorf("without names: %d secrets, want 4", len(all))
	}
}

func TestSDSPlainBundleForThoseWithoutTheValidator(t *testing.T) {
	s := serve(t, entitled("entry/a"), nil, id("/a"))
	far := federate(t, s)
	c, ctx := s.sds(t)
	off, err := structpb.NewStruct(map[string]any{"disable_spiffe_cert_validation": true})
	if err != nil {
		t.Fatal(err)
	}
	for name, n := range map[string]*corev3.Node{
		"told so": {Metadata: off},
		"1.17":    {UserAgentName: "envoy", UserAgentVersionType: &corev3.Node_UserAgentVersion{UserAgentVersion: "1.17.4"}},
	} {
		r, err := c.FetchSecrets(ctx, &discoveryv3.DiscoveryRequest{ResourceNames: []string{"spiffe://example.net"}, Node: n})
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		v := secrets(t, r)["spiffe://example.net"].GetValidationContext()
		if v.GetCustomValidatorConfig() != nil || !bytes.Equal(v.GetTrustedCa().GetInlineBytes(), certsPEM(far.bundle().X509Authorities())) {
			t.Errorf("%s: got %v", name, v)
		}
		// A CA file cannot say which root is for which trust domain.
		_, err = c.FetchSecrets(ctx, &discoveryv3.DiscoveryRequest{ResourceNames: []string{"ALL"}, Node: n})
		if status.Code(err) != codes.PermissionDenied {
			t.Errorf("%s: ALL as one CA file: %v", name, err)
		}
	}
}

func TestSDSRefuses(t *testing.T) {
	many := make([]string, maxNames+1)
	for i := range many {
		many[i] = "default"
	}
	for name, tt := range map[string]struct {
		attest *attestor
		r      *discoveryv3.DiscoveryRequest
		want   codes.Code
	}{
		"an identity of somebody else": {entitled("entry/a"), &discoveryv3.DiscoveryRequest{ResourceNames: []string{"spiffe://example.org/b"}}, codes.PermissionDenied},
		"one good name and one bad":    {entitled("entry/a"), &discoveryv3.DiscoveryRequest{ResourceNames: []string{"default", "nothing"}}, codes.PermissionDenied},
		"a caller without identity":    {entitled(), &discoveryv3.DiscoveryRequest{ResourceNames: []string{"ROOTCA"}}, codes.PermissionDenied},
		"a broken attestor":            {&attestor{}, &discoveryv3.DiscoveryRequest{}, codes.PermissionDenied},
		"another type":                 {entitled("entry/a"), &discoveryv3.DiscoveryRequest{TypeUrl: "type.googleapis.com/envoy.config.cluster.v3.Cluster"}, codes.InvalidArgument},
		"too many names":               {entitled("entry/a"), &discoveryv3.DiscoveryRequest{ResourceNames: many}, codes.InvalidArgument},
	} {
		t.Run(name, func(t *testing.T) {
			s := serve(t, tt.attest, nil, id("/a"), id("/b"))
			c, ctx := s.sds(t)
			if _, err := c.FetchSecrets(ctx, tt.r); status.Code(err) != tt.want {
				t.Errorf("fetch: %v, want %v", err, tt.want)
			}
			st, err := c.StreamSecrets(ctx)
			if err != nil {
				t.Fatal(err)
			}
			if err := st.Send(tt.r); err != nil {
				t.Fatal(err)
			}
			if _, err := st.Recv(); status.Code(err) != tt.want {
				t.Errorf("stream: %v, want %v", err, tt.want)
			}
		})
	}
}

// lines takes a log, one line a write.
type lines chan string

func (l lines) Write(p []byte) (int, error) {
	l <- string(p)
	return len(p), nil
}

func TestSDSStreamFollowsTheState(t *testing.T) {
	log := make(lines, 16)
	a := entitled("entry/a")
	s := serve(t, a, func(c *WorkloadConfig) { c.Log = slog.New(slog.NewTextHandler(log, nil)) }, id("/a"))
	c, ctx := s.sds(t)
	st, err := c.StreamSecrets(ctx)
	if err != nil {
		t.Fatal(err)
	}
	send := func(r *discoveryv3.DiscoveryRequest) {
		t.Helper()
		if err := st.Send(r); err != nil {
			t.Fatal(err)
		}
	}
	recv := func() *discoveryv3.DiscoveryResponse {
		t.Helper()
		r, err := st.Recv()
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	rotate := func() {
		t.Helper()
		st := *s.src.Current()
		next := s.ca.identity(id("/a"), time.Hour)
		next.FederatesWith = st.Identities[0].FederatesWith
		st.Identities = []Identity{next}
		if err := s.src.Set(&st); err != nil {
			t.Fatal(err)
		}
	}
	def := []string{"default"}
	send(&discoveryv3.DiscoveryRequest{TypeUrl: secretType, ResourceNames: def, Node: &corev3.Node{Id: "envoy"}})
	one := recv()
	send(&discoveryv3.DiscoveryRequest{ResourceNames: def, VersionInfo: one.VersionInfo, ResponseNonce: one.Nonce})
	rotate()
	two := recv()
	if two.VersionInfo == one.VersionInfo || two.Nonce == one.Nonce {
		t.Error("rotation did not change version and nonce")
	}
	// Envoy refuses it: it is told nothing until there is something new.
	send(&discoveryv3.DiscoveryRequest{ResourceNames: def, VersionInfo: one.VersionInfo, ResponseNonce: two.Nonce,
		ErrorDetail: &rpcstatus.Status{Code: int32(codes.InvalidArgument), Message: "bad chain"}})
	if line := <-log; !strings.Contains(line, "bad chain") {
		t.Errorf("the refusal is not in the log: %s", line)
	}
	// A stale answer counts for nothing, whatever it names.
	send(&discoveryv3.DiscoveryRequest{ResourceNames: []string{"nothing"}, ResponseNonce: one.Nonce})
	// What is not subscribed does not lead to a message.
	federate(t, s)
	rotate()
	three := recv()
	if three.VersionInfo == two.VersionInfo {
		t.Error("a change of something else was pushed, or the refused one again")
	}
	// More names on the same stream.
	send(&discoveryv3.DiscoveryRequest{ResourceNames: []string{"default", "ALL"}, VersionInfo: three.VersionInfo, ResponseNonce: three.Nonce})
	four := recv()
	if got := trusts(t, secrets(t, four)["ALL"]); got != "example.org example.net" || len(four.Resources) != 2 {
		t.Errorf("ALL trusts %q, %d resources", got, len(four.Resources))
	}
	none := []string{}
	a.entries.Store(&none)
	rotate()
	if _, err := st.Recv(); status.Code(err) != codes.PermissionDenied {
		t.Errorf("after the entitlement ended: %v", err)
	}
}

func TestSDSDelta(t *testing.T) {
	a := entitled("entry/a")
	s := serve(t, a, nil, id("/a"), id("/b"))
	far := federate(t, s)
	c, ctx := s.sds(t)
	open := func(r *discoveryv3.DeltaDiscoveryRequest) secretv3.SecretDiscoveryService_DeltaSecretsClient {
		t.Helper()
		st, err := c.DeltaSecrets(ctx)
		if err == nil {
			err = st.Send(r)
		}
		if err != nil {
			t.Fatal(err)
		}
		return st
	}
	recv := func(st secretv3.SecretDiscoveryService_DeltaSecretsClient, want, gone string) *discoveryv3.DeltaDiscoveryResponse {
		t.Helper()
		r, err := st.Recv()
		if err != nil {
			t.Fatal(err)
		}
		var names []string
		for _, x := range r.Resources {
			names = append(names, x.Name)
		}
		if got := strings.Join(names, " "); got != want || strings.Join(r.RemovedResources, " ") != gone {
			t.Errorf("got %q and removed %q, want %q and %q", got, r.RemovedResources, want, gone)
		}
		return r
	}
	st := open(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: secretType, ResourceNamesSubscribe: []string{"default", "spiffe://example.org/b"}})
	one := recv(st, "default", "spiffe://example.org/b")
	if err := st.Send(&discoveryv3.DeltaDiscoveryRequest{ResponseNonce: one.Nonce, ErrorDetail: &rpcstatus.Status{Message: "no"}, ResourceNamesSubscribe: []string{"spiffe://example.net"}}); err != nil {
		t.Fatal(err)
	}
	recv(st, "spiffe://example.net", "")
	// The entry for /b comes, the federation ends.
	both := []string{"entry/a", "entry/b"}
	a.entries.Store(&both)
	now := *s.src.Current()
	now.Federated = nil
	if err := s.src.Set(&now); err != nil {
		t.Fatal(err)
	}
	recv(st, "spiffe://example.org/b", "spiffe://example.net")
	if err := st.Send(&discoveryv3.DeltaDiscoveryRequest{ResourceNamesUnsubscribe: []string{"spiffe://example.org/b"}, ResourceNamesSubscribe: []string{"default"}}); err != nil {
		t.Fatal(err)
	}
	recv(st, "default", "")

	// A stream that resumes is sent only what it does not have.
	again := open(&discoveryv3.DeltaDiscoveryRequest{
		ResourceNamesSubscribe:  []string{"default", "ROOTCA"},
		InitialResourceVersions: map[string]string{"default": one.Resources[0].Version},
	})
	recv(again, "ROOTCA", "")
	every := open(&discoveryv3.DeltaDiscoveryRequest{})
	recv(every, "spiffe://example.org spiffe://example.org/a spiffe://example.org/b", "")
	now.Federated = map[spiffeid.TrustDomain]*x509bundle.Bundle{far.td: far.bundle()}
	if err := s.src.Set(&now); err != nil {
		t.Fatal(err)
	}
	recv(every, "spiffe://example.net", "")
	now.Federated = nil
	if err := s.src.Set(&now); err != nil {
		t.Fatal(err)
	}
	recv(every, "", "spiffe://example.net")
}
