package attest

import (
	"context"
	"crypto"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"net/http"
	"net/http/httptest"
	"slices"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/attest/attesttest"
	"sallyport/internal/mesh"
)

const (
	azureSub    = "8d10da13-8125-4ba9-a717-bf7490507b3d"
	azureTenant = "11111111-2222-3333-4444-555555555555"
	azureVM     = "02aab8a4-74ef-476e-8182-f6d2ba4166a6"
)

// azureDocument is the sample of Microsoft's manual with a time of today.
func azureDocument(t testing.TB, change ...any) []byte {
	now := time.Now().UTC()
	return jsonOf(t, with(map[string]any{
		"licenseType": "", "nonce": "NONCE", "plan": map[string]any{"name": "", "product": "", "publisher": ""}, "sku": "Windows-Server-2012-R2-Datacenter",
		"subscriptionId": azureSub, "vmId": azureVM,
		"timeStamp": map[string]any{"createdOn": now.Format(azureTime), "expiresOn": now.Add(6 * time.Hour).Format(azureTime)},
	}, change...))
}

func azureAnswer(t testing.TB, signed []byte) []byte {
	return jsonOf(t, map[string]any{"document": map[string]any{"encoding": "pkcs7", "signature": base64.StdEncoding.EncodeToString(signed)}})
}

// asked is a verifier that is answered with what the suite calls the payload.
type asked struct{ c Challenger }

func (a asked) Verify(ctx context.Context, answer []byte, key crypto.PublicKey) (spiffeid.ID, []mesh.Selector, error) {
	return a.c.VerifyAnswer(ctx, []byte("{}"), key, func([]byte) ([]byte, error) { return answer, nil })
}

func isAzure(c *x509.Certificate) { c.DNSNames = []string{"westus.metadata.azure.com"} }

func TestAzureIMDS(t *testing.T) {
	root := authority{}.sign(t, nil, isCA)
	microsoft := root.sign(t, rsaKey(t), isCA, func(c *x509.Certificate) { c.Subject.CommonName = "intermediate" })
	azure := microsoft.sign(t, rsaKey(t), isAzure)
	stranger := rsaKey(t)
	fresh := func(t *testing.T) *azureIMDS {
		c := AzureIMDSConfig{Subscriptions: map[string]string{azureSub: azureTenant}, CAFile: pemFile(t, root.cert, microsoft.cert)}
		if errs := c.validate("azure_imds"); len(errs) > 0 {
			t.Fatal(errs)
		}
		v, err := NewAzureIMDS(td, c, &memSeen{})
		if err != nil {
			t.Fatal(err)
		}
		a := v.(*azureIMDS)
		a.nonce = func() string { return "NONCE" }
		return a
	}
	good := cms{by: azure, attrs: true, withCert: true}
	agent := spiffeid.RequireFromString("spiffe://example.org/spire/agent/azure_imds/" + azureTenant + "/" + azureSub + "/" + azureVM)
	attesttest.Run(t, func(t *testing.T) attesttest.Fixture {
		say := func(change ...any) []byte { return azureAnswer(t, good.sign(t, azureDocument(t, change...))) }
		by := func(a authority) []byte {
			return azureAnswer(t, cms{by: a, attrs: true, withCert: true}.sign(t, azureDocument(t)))
		}
		at := func(from, until time.Duration) map[string]any {
			now := time.Now().UTC()
			return map[string]any{"createdOn": now.Add(from).Format(azureTime), "expiresOn": now.Add(until).Format(azureTime)}
		}
		return attesttest.Fixture{
			Verifier: asked{fresh(t)}, SingleUse: true, Agent: agent, Good: say(),
			Stale: [][]byte{
				say("nonce", "OTHER"), say("nonce", nil), say("nonce", ""), say("timeStamp", at(-7*time.Hour, -time.Minute)),
				say("timeStamp", at(time.Minute, time.Hour)), say("timeStamp", nil), say("timeStamp", map[string]any{"createdOn": "x", "expiresOn": "y"}),
			},
			Foreign: [][]byte{
				say("subscriptionId", azureTenant), say("subscriptionId", nil),
				by(authority{}.sign(t, stranger, isAzure)), // of no authority
				by(microsoft.sign(t, stranger, func(c *x509.Certificate) {
					c.DNSNames = []string{"metadata.azure.com.evil.example", "evilmetadata.azure.com"}
				})),
				by(microsoft.sign(t, stranger)),
				by(microsoft.sign(t, stranger, isAzure, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) })),
			},
			Forged: [][]byte{
				say("vmId", nil), say("vmId", "../../server"),
				azureAnswer(t, cms{by: azure, attrs: true}.sign(t, azureDocument(t))),                                 // no certificate
				azureAnswer(t, cms{by: azure, attrs: true, withCert: true, detached: true}.sign(t, azureDocument(t))), // no content
				azureAnswer(t, cms{by: azure, attrs: true, withCert: true, over: azureDocument(t, "vmId", "x")}.sign(t, azureDocument(t))),
				azureAnswer(t, nil), azureAnswer(t, []byte{0x30, 0x80}), azureDocument(t),
				jsonOf(t, map[string]any{"document": map[string]any{"encoding": "jws", "signature": "AAAA"}}),
			},
		}
	})
	v := fresh(t)
	v.nonce = nil
	if _, _, err := v.Verify(t.Context(), []byte("{}"), attesttest.Key(t)); !errors.Is(err, ErrEvidence) {
		t.Errorf("without a challenge: %v", err)
	}

	// The whole way, with the nonce that is really asked.
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Metadata") != "true" || r.URL.Path != "/metadata/attested/document" || r.URL.Query().Get("api-version") != azureVersion {
			w.WriteHeader(http.StatusBadRequest)
			return
		}
		jsonTo(w, map[string]any{"encoding": "pkcs7", "signature": base64.StdEncoding.EncodeToString(good.sign(t, azureDocument(t, "nonce", r.URL.Query().Get("nonce"))))})
	}))
	defer srv.Close()
	e, err := NewEvidence(NodeConfig{Kind: AzureIMDS, MetadataURL: srv.URL})
	if err != nil {
		t.Fatal(err)
	}
	payload, err := e.Payload(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	c := fresh(t)
	c.nonce = func() string { return "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567" }
	id, sel, err := c.VerifyAnswer(t.Context(), payload, attesttest.Key(t), e.Answer)
	want := []mesh.Selector{{Type: AzureIMDS, Value: "subscription-id:" + azureSub}, {Type: AzureIMDS, Value: "vm-id:" + azureVM}}
	if err != nil || id != agent || !slices.Equal(sel, want) {
		t.Errorf("%s, %v, %v", id, sel, err)
	}
}

func FuzzAzureAnswer(f *testing.F) {
	azure := authority{}.sign(f, rsaKey(f), isAzure)
	f.Add(azureAnswer(f, cms{by: azure, attrs: true, withCert: true}.sign(f, azureDocument(f))))
	f.Fuzz(func(t *testing.T, b []byte) {
		if sd, err := parseAzureAnswer(b); err == nil && sd.hash == 0 {
			t.Error("a document without a signature was read")
		}
	})
}
