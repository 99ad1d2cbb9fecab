package attest

import (
	"bytes"
	"cmp"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/jose"
	"sallyport/internal/mesh"
)

// AzureIMDS is the name of the attestation by the attested document of Azure's
// Instance Metadata Service.
const AzureIMDS = "azure_imds"

const (
	azureMetadata = "http://169.254.169.254"
	azureVersion  = "2025-04-07"
	azureDomain   = "metadata.azure.com"
	azureTime     = "01/02/06 15:04:05 -0700"
)

var uuid = regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$`)

// AzureIMDSConfig says which virtual machines admit a node.
type AzureIMDSConfig struct {
	// Subscriptions that machines belong to, by ID, each with the ID of its
	// tenant. Required.
	Subscriptions map[string]string `yaml:"subscriptions"`
	// CAFile is a PEM file with the roots, and the intermediates, of the
	// certificates that sign documents. Required.
	CAFile string `yaml:"ca_file"`
	// Domain that those certificates are for, itself or a name below it.
	// Default "metadata.azure.com".
	Domain string `yaml:"domain"`
}

func (c *AzureIMDSConfig) validate(field string) []error {
	var errs []error
	if len(c.Subscriptions) == 0 {
		errs = append(errs, fmt.Errorf("%s.subscriptions: missing; write subscription: tenant, or anybody's machines could join", field))
	}
	for _, s := range slices.Sorted(maps.Keys(c.Subscriptions)) {
		if !uuid.MatchString(s) || !uuid.MatchString(c.Subscriptions[s]) {
			errs = append(errs, fmt.Errorf("%s.subscriptions.%s: want the ID of a subscription and the ID of its tenant, in lower case", field, s))
		}
	}
	if c.CAFile == "" {
		errs = append(errs, fmt.Errorf("%s.ca_file: missing; write the PEM file with the authorities of Azure's certificates", field))
	}
	return errs
}

// NewAzureIMDS verifies attested documents by challenge and response, in the
// wire format of SPIRE's azure_imds: the question is a nonce, the answer holds
// a document that was signed for it. Any program on a machine may ask for one,
// so a machine counts for the first key that shows its document, for ever.
// Agents are named spiffe://TD/spire/agent/azure_imds/TENANT/SUBSCRIPTION/VM.
func NewAzureIMDS(td spiffeid.TrustDomain, c AzureIMDSConfig, seen Seen) (Challenger, error) {
	c.Domain = cmp.Or(c.Domain, azureDomain)
	if _, err := readCertificates(c.CAFile); err != nil {
		return nil, fmt.Errorf("azure_imds.ca_file: %w", err)
	}
	return &azureIMDS{td: td, cfg: c, seen: seen, now: time.Now, nonce: rand.Text}, nil
}

type azureIMDS struct {
	td    spiffeid.TrustDomain
	cfg   AzureIMDSConfig
	seen  Seen
	now   func() time.Time
	nonce func() string // letters and digits, 128 bits or more
}

// Verify refuses: what is not signed for our nonce may be old.
func (*azureIMDS) Verify(context.Context, []byte, crypto.PublicKey) (spiffeid.ID, []mesh.Selector, error) {
	return spiffeid.ID{}, nil, refused("azure_imds evidence needs the answer to a challenge")
}

// Once says that a machine is bound to the first key, so that its agent renews
// instead of attesting again.
func (*azureIMDS) Once() bool { return true }

func (v *azureIMDS) VerifyAnswer(ctx context.Context, payload []byte, key crypto.PublicKey, ask func([]byte) ([]byte, error)) (spiffeid.ID, []mesh.Selector, error) {
	id, sel, err := v.verify(ctx, payload, key, ask)
	if err != nil {
		return spiffeid.ID{}, nil, err
	}
	return id, sel, nil
}

func (v *azureIMDS) verify(ctx context.Context, payload []byte, key crypto.PublicKey, ask func([]byte) ([]byte, error)) (id spiffeid.ID, sel []mesh.Selector, err error) {
	keyHash, err := begin(ctx, AzureIMDS, payload, key) // what the payload says does not count
	if err != nil {
		return id, nil, err
	}
	nonce := v.nonce()
	answer, err := ask([]byte(nonce))
	if err != nil {
		return id, nil, fmt.Errorf("azure_imds: ask for a document: %w", err)
	}
	sd, err := parseAzureAnswer(answer)
	if err != nil {
		return id, nil, refused("azure_imds: %v", err)
	}
	if err := v.signedByAzure(sd); err != nil {
		return id, nil, err
	}
	d, err := jose.ParseObject(sd.content)
	if err != nil {
		return id, nil, refused("azure_imds: document: %v", err)
	}
	subscription, _ := d["subscriptionId"].(string)
	vm, _ := d["vmId"].(string)
	vm = strings.ToLower(vm)
	tenant := v.cfg.Subscriptions[strings.ToLower(subscription)]
	switch {
	case d["nonce"] != nonce:
		return id, nil, refused("azure_imds: the document is not for our nonce")
	case tenant == "":
		return id, nil, refused("azure_imds: the subscription is not configured")
	case !uuid.MatchString(vm):
		return id, nil, refused("azure_imds: document: vmId is missing or malformed")
	}
	if err := v.checkTime(d.Child("timeStamp")); err != nil {
		return id, nil, err
	}
	subscription = strings.ToLower(subscription)
	if id, err = spiffeid.FromSegments(v.td, "spire", "agent", AzureIMDS, tenant, subscription, vm); err != nil {
		return id, nil, refused("azure_imds: the machine cannot be part of an agent's ID")
	}
	sel = []mesh.Selector{{Type: AzureIMDS, Value: "subscription-id:" + subscription}, {Type: AzureIMDS, Value: "vm-id:" + vm}}
	return id, sel, claimMachine(ctx, v.seen, id, keyHash)
}

func (v *azureIMDS) checkTime(stamp jose.Object) error {
	created, _ := stamp["createdOn"].(string)
	expires, _ := stamp["expiresOn"].(string)
	from, err1 := time.Parse(azureTime, created)
	until, err2 := time.Parse(azureTime, expires)
	now := v.now()
	switch {
	case err1 != nil || err2 != nil:
		return refused("azure_imds: document: timeStamp is missing or malformed")
	case now.Add(jose.Skew).Before(from):
		return refused("azure_imds: the document is from the future: check both clocks")
	case !now.Before(until.Add(jose.Skew)):
		return refused("azure_imds: the document has expired")
	}
	return nil
}

// signedByAzure wants a signature by a certificate of the metadata service that
// an authority of ours has issued.
func (v *azureIMDS) signedByAzure(sd *signedData) error {
	authorities, err := readCertificates(v.cfg.CAFile)
	if err != nil {
		return fmt.Errorf("azure_imds.ca_file: %w", err)
	}
	o := x509.VerifyOptions{
		Roots: x509.NewCertPool(), Intermediates: x509.NewCertPool(), CurrentTime: v.now(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	}
	for _, a := range authorities {
		if bytes.Equal(a.RawIssuer, a.RawSubject) {
			o.Roots.AddCert(a)
		} else {
			o.Intermediates.AddCert(a)
		}
	}
	var leaf *x509.Certificate
	for _, c := range sd.certs {
		if sd.signedBy(c) {
			leaf = c
		} else {
			o.Intermediates.AddCert(c)
		}
	}
	if leaf == nil || sd.content == nil {
		return refused("azure_imds: the document comes without its signer's certificate or without content")
	}
	if !slices.ContainsFunc(leaf.DNSNames, func(n string) bool {
		n = strings.TrimPrefix(n, "*.")
		return n == v.cfg.Domain || strings.HasSuffix(n, "."+v.cfg.Domain)
	}) {
		return refused("azure_imds: the signer is not the metadata service")
	}
	if _, err := leaf.Verify(o); err != nil {
		return refused("azure_imds: the signer is not trusted: %v", err)
	}
	if err := sd.verify(sd.content, leaf); err != nil {
		return refused("azure_imds: document: %v", err)
	}
	return nil
}

// parseAzureAnswer reads {"document": {"encoding": "pkcs7", "signature": ...},
// "metadata": {...}}. The metadata is not signed and not looked at.
func parseAzureAnswer(b []byte) (*signedData, error) {
	if len(b) > maxEvidence {
		return nil, fmt.Errorf("answer of %d bytes, want at most %d", len(b), maxEvidence)
	}
	o, err := jose.ParseObject(b)
	if err == nil {
		err = o.Only("document", "metadata")
	}
	if err != nil {
		return nil, err
	}
	d := o.Child("document")
	if err := d.Only("encoding", "signature"); err != nil {
		return nil, err
	}
	if d["encoding"] != "pkcs7" {
		return nil, errors.New("the document is not in pkcs7")
	}
	text, err := d.Text("signature")
	if err != nil {
		return nil, err
	}
	ber, err := jose.Decode64(base64.StdEncoding, text)
	if err != nil {
		return nil, err
	}
	return parseSignedData(ber)
}

// azureEvidence is the node's side: the metadata service.
type azureEvidence struct {
	base   string
	client *http.Client
}

func (azureEvidence) Kind() string { return AzureIMDS }

func (azureEvidence) Payload(context.Context) ([]byte, error) { return []byte("{}"), nil }

func (e azureEvidence) Answer(nonce []byte) ([]byte, error) {
	q := url.Values{"nonce": {string(nonce)}, "api-version": {azureVersion}}
	b, err := askMetadata(context.Background(), e.client, http.MethodGet, e.base+"/metadata/attested/document?"+q.Encode(), "Metadata", "true")
	if err != nil {
		return nil, err
	}
	o, err := jose.ParseObject(b)
	if err != nil {
		return nil, fmt.Errorf("answer of the metadata service: %w", err)
	}
	return json.Marshal(map[string]any{
		"document": map[string]any{"encoding": o["encoding"], "signature": o["signature"]}, "metadata": map[string]any{"agentDomain": "", "vmssName": nil},
	})
}
