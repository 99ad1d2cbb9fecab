package svid

import (
	"cmp"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"regexp"
	"slices"
	"strconv"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/anypb"
)

// The names of secrets are those of SPIRE, so that an Envoy configuration
// written for spire-agent works unchanged. Beside them stand the SPIFFE ID of
// each identity and the ID of each trust domain.
const (
	sdsDefault = "default" // the first identity
	sdsRoot    = "ROOTCA"  // the bundle of the own trust domain
	sdsAll     = "ALL"     // every bundle, each for its own trust domain
)

// maxNames bounds the secrets that one subscription may name.
const maxNames = 128

// A secret is one resource, ready to be sent. Its version follows from what
// is public in it.
type secret struct {
	name, version string
	body          *anypb.Any
}

// A secretMaker builds what one caller may have at one moment.
type secretMaker struct {
	g *grant
	// plain gives bundles as CA files, for an Envoy without the SPIFFE
	// validator.
	plain bool
}

// all are the secrets that a subscription without names gets.
func (m secretMaker) all() ([]secret, error) {
	var names []string
	for _, b := range m.bundles() {
		names = append(names, b.TrustDomain().IDString())
	}
	for _, id := range m.g.ids {
		if n := id.ID.String(); !slices.Contains(names, n) {
			names = append(names, n)
		}
	}
	return m.named(names)
}

// named gives the secrets of these names, in their order, without those that
// the caller may not have or that do not exist.
func (m secretMaker) named(names []string) ([]secret, error) {
	var out []secret
	for _, n := range names {
		s, ok, err := m.one(n)
		if err != nil {
			return nil, err
		}
		if ok {
			out = append(out, s)
		}
	}
	return out, nil
}

func (m secretMaker) one(name string) (secret, bool, error) {
	switch name {
	case sdsDefault:
		return m.identity(name, m.g.ids[0])
	case sdsRoot:
		return m.validation(name, m.g.state.Bundle)
	case sdsAll:
		if m.plain { // CA files of several trust domains must not be merged
			return secret{}, false, nil
		}
		return m.validation(name, m.bundles()...)
	}
	for _, id := range m.g.ids {
		if id.ID.String() == name {
			return m.identity(name, id)
		}
	}
	for _, b := range m.bundles() {
		if b.TrustDomain().IDString() == name {
			return m.validation(name, b)
		}
	}
	return secret{}, false, nil
}

// bundles are the own one, then the federated ones by name.
func (m secretMaker) bundles() []*x509bundle.Bundle {
	out := []*x509bundle.Bundle{m.g.state.Bundle}
	for _, b := range m.g.federated() {
		out = append(out, b)
	}
	slices.SortFunc(out[1:], func(a, b *x509bundle.Bundle) int {
		return cmp.Compare(a.TrustDomain().Name(), b.TrustDomain().Name())
	})
	return out
}

func (m secretMaker) identity(name string, id Identity) (secret, bool, error) {
	key, err := x509.MarshalPKCS8PrivateKey(id.Key)
	if err != nil {
		return secret{}, false, status.Error(codes.Internal, "private key cannot be encoded")
	}
	body := &tlsv3.Secret{Name: name, Type: &tlsv3.Secret_TlsCertificate{TlsCertificate: &tlsv3.TlsCertificate{
		CertificateChain: inline(certsPEM(id.Chain)),
		PrivateKey:       inline(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})),
	}}}
	return pack(body, joinDER(id.Chain))
}

func (m secretMaker) validation(name string, bundles ...*x509bundle.Bundle) (secret, bool, error) {
	ctx := &tlsv3.CertificateValidationContext{}
	var public []byte
	conf := &tlsv3.SPIFFECertValidatorConfig{}
	for _, b := range bundles {
		if b.Empty() {
			continue // Envoy refuses the whole validator for one empty bundle
		}
		public = append(append(public, b.TrustDomain().Name()...), bundleDER(b)...)
		conf.TrustDomains = append(conf.TrustDomains, &tlsv3.SPIFFECertValidatorConfig_TrustDomain{
			Name: b.TrustDomain().Name(), TrustBundle: inline(certsPEM(b.X509Authorities())),
		})
	}
	if len(conf.TrustDomains) == 0 {
		return secret{}, false, nil
	}
	if m.plain {
		ctx.TrustedCa = conf.TrustDomains[0].TrustBundle
		public = append(public, "plain"...)
	} else {
		a, err := anypb.New(conf)
		if err != nil {
			return secret{}, false, status.Error(codes.Internal, "validator cannot be encoded")
		}
		ctx.CustomValidatorConfig = &corev3.TypedExtensionConfig{Name: "envoy.tls.cert_validator.spiffe", TypedConfig: a}
	}
	body := &tlsv3.Secret{Name: name, Type: &tlsv3.Secret_ValidationContext{ValidationContext: ctx}}
	return pack(body, public)
}

func pack(body *tlsv3.Secret, public []byte) (secret, bool, error) {
	a, err := anypb.New(body)
	if err != nil {
		return secret{}, false, status.Error(codes.Internal, "secret cannot be encoded")
	}
	sum := sha256.Sum256(public)
	return secret{name: body.Name, version: hex.EncodeToString(sum[:8]), body: a}, true, nil
}

func inline(b []byte) *corev3.DataSource {
	return &corev3.DataSource{Specifier: &corev3.DataSource_InlineBytes{InlineBytes: b}}
}

func certsPEM(cs []*x509.Certificate) (out []byte) {
	for _, c := range cs {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return out
}

var envoyVersion = regexp.MustCompile(`^(?:[0-9a-f]{40}/)?1\.([0-9]{1,4})\.`)

// wantsPlain reports whether an Envoy has no SPIFFE validator (it came with
// 1.18), or is told not to use it in the way that SPIRE reads.
func wantsPlain(n *corev3.Node) bool {
	if f := n.GetMetadata().GetFields()["disable_spiffe_cert_validation"]; f.GetBoolValue() || f.GetStringValue() == "true" {
		return true
	}
	if v := n.GetUserAgentBuildVersion().GetVersion(); v != nil {
		return v.GetMajorNumber() == 1 && v.GetMinorNumber() < 18
	}
	m := envoyVersion.FindStringSubmatch(n.GetUserAgentVersion())
	if n.GetUserAgentName() != "envoy" || m == nil {
		return false
	}
	minor, _ := strconv.Atoi(m[1]) // digits only
	return minor < 18
}
