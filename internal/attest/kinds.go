package attest

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/mesh"
)

// Config says which kinds of node evidence the issuer accepts beside join
// tokens. A kind that is not written is refused.
type Config struct {
	X509PoP   *X509PoPConfig   `yaml:"x509pop"`
	OIDC      *OIDCConfig      `yaml:"oidc"`
	K8sPSAT   *K8sPSATConfig   `yaml:"k8s_psat"`
	AWSIID    *AWSIIDConfig    `yaml:"aws_iid"`
	GCPIIT    *GCPIITConfig    `yaml:"gcp_iit"`
	AzureIMDS *AzureIMDSConfig `yaml:"azure_imds"`
}

// Validate reports every mistake, by field.
func (c *Config) Validate() error {
	var errs []error
	if c.X509PoP != nil {
		errs = append(errs, c.X509PoP.validate("attestors.x509pop")...)
	}
	if c.OIDC != nil {
		errs = append(errs, c.OIDC.validate("attestors.oidc")...)
	}
	if c.K8sPSAT != nil {
		errs = append(errs, c.K8sPSAT.validate("attestors.k8s_psat")...)
	}
	if c.AWSIID != nil {
		errs = append(errs, c.AWSIID.validate("attestors.aws_iid")...)
	}
	if c.GCPIIT != nil {
		errs = append(errs, c.GCPIIT.validate("attestors.gcp_iit")...)
	}
	if c.AzureIMDS != nil {
		errs = append(errs, c.AzureIMDS.validate("attestors.azure_imds")...)
	}
	return errors.Join(errs...)
}

// NewVerifiers makes the verifier of each kind that c configures, by name.
func NewVerifiers(td spiffeid.TrustDomain, c Config, seen Seen) (map[string]NodeVerifier, error) {
	out := map[string]NodeVerifier{}
	var errs []error
	keep := func(kind string, v NodeVerifier, err error) {
		out[kind] = v
		errs = append(errs, err)
	}
	if c.X509PoP != nil {
		v, err := NewX509PoP(td, *c.X509PoP)
		keep(X509PoP, v, err)
	}
	if c.OIDC != nil {
		v, err := NewOIDC(td, *c.OIDC, seen)
		keep(OIDC, v, err)
	}
	if c.K8sPSAT != nil {
		v, err := NewK8sPSAT(td, *c.K8sPSAT, seen)
		keep(K8sPSAT, v, err)
	}
	if c.AWSIID != nil {
		v, err := NewAWSIID(td, *c.AWSIID, seen)
		keep(AWSIID, v, err)
	}
	if c.GCPIIT != nil {
		v, err := NewGCPIIT(td, *c.GCPIIT, seen)
		keep(GCPIIT, v, err)
	}
	if c.AzureIMDS != nil {
		v, err := NewAzureIMDS(td, *c.AzureIMDS, seen)
		keep(AzureIMDS, v, err)
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	return out, nil
}

// Evidence is how a node proves itself: the other side of a NodeVerifier. It is
// asked anew at each attestation.
type Evidence interface {
	// Kind is the name of the node attestor.
	Kind() string
	Payload(ctx context.Context) ([]byte, error)
	// Answer answers a challenge of the issuer.
	Answer(challenge []byte) ([]byte, error)
}

// NodeConfig says how a node proves itself. Which fields a kind needs stands
// with it; those of other kinds are mistakes.
type NodeConfig struct {
	// Kind is x509pop, oidc, k8s_psat, aws_iid, gcp_iit or azure_imds; without it
	// the node joins by a token.
	Kind string `yaml:"kind"`
	// CertificateFile and KeyFile are PEM files of the node: its certificate,
	// with intermediates after it, and the private key. Needed for x509pop.
	CertificateFile string `yaml:"certificate_file"`
	KeyFile         string `yaml:"key_file"`
	// TokenFile holds the token that the platform gave to the node: for k8s_psat
	// a projected service account token. Kind oidc asks GitHub Actions for one
	// when it is not written.
	TokenFile string `yaml:"token_file"`
	// Audience is what a token is asked for. Default "sallyport".
	Audience string `yaml:"audience"`
	// Cluster is the name under which the issuer knows the cluster. Needed for
	// k8s_psat.
	Cluster string `yaml:"cluster"`
	// MetadataURL is the metadata service of the cloud. Default: where each
	// cloud has it.
	MetadataURL string `yaml:"metadata_url"`
	// ServiceAccount of the instance, for gcp_iit. Default "default".
	ServiceAccount string `yaml:"service_account"`
}

// nodeKinds lists the fields of each kind, those it needs and those it may
// have.
var nodeKinds = map[string]struct{ needs, may []string }{
	X509PoP:   {needs: []string{"certificate_file", "key_file"}},
	OIDC:      {may: []string{"token_file", "audience"}},
	K8sPSAT:   {needs: []string{"cluster", "token_file"}},
	AWSIID:    {may: []string{"metadata_url"}},
	GCPIIT:    {may: []string{"metadata_url", "service_account"}},
	AzureIMDS: {may: []string{"metadata_url"}},
}

// fields gives what is written, by name.
func (c NodeConfig) fields() map[string]string {
	return map[string]string{
		"certificate_file": c.CertificateFile, "key_file": c.KeyFile, "token_file": c.TokenFile, "audience": c.Audience, "cluster": c.Cluster,
		"metadata_url": c.MetadataURL, "service_account": c.ServiceAccount,
	}
}

// Validate reports every mistake, by field.
func (c NodeConfig) Validate() error {
	have := c.fields()
	if c.Kind == "" {
		for _, name := range slices.Sorted(maps.Keys(have)) {
			if have[name] != "" {
				return fmt.Errorf("issuer.attest.kind: missing beside %s; write one of %s", name, kindNames())
			}
		}
		return nil
	}
	kind, ok := nodeKinds[c.Kind]
	if !ok {
		return fmt.Errorf("issuer.attest.kind: %q is unknown%s", c.Kind, mesh.DidYouMean(c.Kind, slices.Sorted(maps.Keys(nodeKinds))))
	}
	var errs []error
	for _, name := range slices.Sorted(maps.Keys(have)) {
		needed := slices.Contains(kind.needs, name)
		switch {
		case have[name] == "" && needed:
			errs = append(errs, fmt.Errorf("issuer.attest.%s: missing; kind %s needs it", name, c.Kind))
		case have[name] != "" && !needed && !slices.Contains(kind.may, name):
			errs = append(errs, fmt.Errorf("issuer.attest.%s: has no meaning for kind %s; leave it out", name, c.Kind))
		}
	}
	return errors.Join(errs...)
}

func kindNames() string { return strings.Join(slices.Sorted(maps.Keys(nodeKinds)), ", ") }

// NewEvidence makes the evidence that c describes; nil when that is a join
// token.
func NewEvidence(c NodeConfig) (Evidence, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	switch c.Kind {
	case X509PoP:
		return popEvidence{certificate: c.CertificateFile, key: c.KeyFile}, nil
	case OIDC:
		return newOIDCEvidence(c)
	case K8sPSAT:
		return psatEvidence{cluster: c.Cluster, file: c.TokenFile}, nil
	case AWSIID:
		return awsEvidence{base: cmp.Or(c.MetadataURL, awsMetadata), client: metadataClient()}, nil
	case GCPIIT:
		return newGCPEvidence(c), nil
	case AzureIMDS:
		return azureEvidence{base: cmp.Or(c.MetadataURL, azureMetadata), client: metadataClient()}, nil
	}
	return nil, nil
}
