package federation

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/meshtest"
)

var (
	near = spiffeid.RequireTrustDomainFromString("near.example")
	far  = spiffeid.RequireTrustDomainFromString("far.example")
)

// bundleOf is a bundle of a fresh authority, with an EC and an RSA key.
func bundleOf(t testing.TB, td spiffeid.TrustDomain) (*Bundle, *meshtest.CA) {
	t.Helper()
	ca := meshtest.NewCA(t, td)
	r, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	return &Bundle{
		TrustDomain: td, X509: ca.Bundle().X509Authorities(), Sequence: 7, RefreshHint: 10 * time.Minute,
		JWT: []Key{{"k1", meshtest.NewKey(t).Public()}, {"k2", r.Public()}},
	}, ca
}

func encode(t testing.TB, b *Bundle) []byte {
	t.Helper()
	doc, err := b.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return doc
}

func equal(a, b crypto.PublicKey) bool {
	k, ok := a.(interface{ Equal(crypto.PublicKey) bool })
	return ok && k.Equal(b)
}

func TestDocumentIsReadByOthersAndByUs(t *testing.T) {
	b, _ := bundleOf(t, far)
	doc := encode(t, b)
	theirs, err := spiffebundle.Parse(far, doc)
	if err != nil {
		t.Fatalf("go-spiffe: %v\n%s", err, doc)
	}
	seq, _ := theirs.SequenceNumber()
	hint, _ := theirs.RefreshHint()
	if len(theirs.X509Authorities()) != 1 || len(theirs.JWTAuthorities()) != 2 || seq != 7 || hint != 10*time.Minute {
		t.Errorf("go-spiffe reads %d authorities, %d keys, sequence %d, hint %s", len(theirs.X509Authorities()), len(theirs.JWTAuthorities()), seq, hint)
	}
	ours, err := Decode(far, doc)
	if err != nil {
		t.Fatal(err)
	}
	if len(ours.X509) != 1 || !ours.X509[0].Equal(b.X509[0]) || len(ours.JWT) != 2 || ours.Sequence != 7 || ours.RefreshHint != 10*time.Minute {
		t.Errorf("we read %+v", ours)
	}
	for i, k := range ours.JWT {
		if k.ID != b.JWT[i].ID || !equal(k.Public, b.JWT[i].Public) {
			t.Errorf("key %d is another", i)
		}
	}
	back, err := theirs.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Decode(far, back); err != nil {
		t.Errorf("what go-spiffe writes: %v", err)
	}
}

// TestDocumentMusts holds the document to the numbered demands of the SPIFFE
// specifications on whoever publishes it.
func TestDocumentMusts(t *testing.T) {
	b, _ := bundleOf(t, far)
	var d map[string]any
	if err := json.Unmarshal(encode(t, b), &d); err != nil {
		t.Fatal(err)
	}
	keys := d["keys"].([]any)
	if len(keys) != 3 {
		t.Fatalf("75: %d keys", len(keys))
	}
	for _, v := range keys {
		k := v.(map[string]any)
		if k["kty"] == nil {
			t.Error("78: kty is missing")
		}
		switch k["use"] {
		case "x509-svid": // 34
			if _, has := k["kid"]; has {
				t.Error("35: an X.509 element has a kid")
			}
			if x, _ := k["x5c"].([]any); len(x) != 1 || x[0] != base64.StdEncoding.EncodeToString(b.X509[0].Raw) {
				t.Error("36, 37: x5c is not the one CA certificate")
			}
		case "jwt-svid": // 52
			if k["kid"] == nil {
				t.Error("53: a JWT key has no kid")
			}
		default:
			t.Errorf("79: use %v", k["use"])
		}
	}
	empty, err := (&Bundle{TrustDomain: far}).Encode()
	if err != nil || string(empty) != `{"keys":[]}` {
		t.Errorf("75: an empty bundle is %s, %v", empty, err)
	}
}

func TestDecodeAccepts(t *testing.T) {
	b, _ := bundleOf(t, far)
	var d map[string]any
	if err := json.Unmarshal(encode(t, b), &d); err != nil {
		t.Fatal(err)
	}
	x := d["keys"].([]any)[0].(map[string]any)
	with := func(change map[string]any) string {
		k := map[string]any{}
		for n, v := range x {
			k[n] = v
		}
		for n, v := range change {
			if k[n] = v; v == nil {
				delete(k, n)
			}
		}
		s, err := json.Marshal(map[string]any{"keys": []any{k}})
		if err != nil {
			t.Fatal(err)
		}
		return string(s)
	}
	other := base64.StdEncoding.EncodeToString([]byte("no certificate"))
	for name, tt := range map[string]struct {
		doc  string
		want int // X.509 authorities
	}{
		"38 without x5c":                       {with(map[string]any{"x5c": nil}), 0},
		"38 with an empty x5c":                 {with(map[string]any{"x5c": []any{}}), 0},
		"39 all but the first x5c are ignored": {with(map[string]any{"x5c": []any{x["x5c"].([]any)[0], other}}), 1},
		"72 unknown parameters":                {strings.Replace(with(nil), `{"keys"`, `{"extra":{"a":[1]},"keys"`, 1), 1},
		"76 an unknown kty":                    {with(map[string]any{"kty": "AKP"}), 0},
		"76 an unknown use":                    {with(map[string]any{"use": "wit-svid"}), 0},
		"79 no use":                            {with(map[string]any{"use": nil}), 0},
		"79 use in upper case":                 {with(map[string]any{"use": "X509-SVID"}), 0},
		"77 nothing at all":                    {`{"keys":[]}`, 0},
		"a kid is no harm to a reader":         {with(map[string]any{"kid": "x"}), 1},
	} {
		got, err := Decode(far, []byte(tt.doc))
		if err != nil || len(got.X509) != tt.want {
			t.Errorf("%s: %d authorities, %v", name, len(got.X509), err)
		}
	}
}

func TestDecodeRefuses(t *testing.T) {
	b, ca := bundleOf(t, far)
	good := string(encode(t, b))
	other, _ := bundleOf(t, far)
	leaf := meshtest.Identity(t, ca, spiffeid.RequireFromPath(far, "/w")).Chain[0]
	weak, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	n := base64.RawURLEncoding.EncodeToString(weak.N.Bytes()[:128])
	cert := func(raw []byte) string { return base64.StdEncoding.EncodeToString(raw) }
	p224, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := p224.PublicKey.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	b64 := base64.RawURLEncoding.EncodeToString
	for name, tt := range map[string]struct{ doc, say string }{
		"not JSON":                    {`keys`, "malformed"},
		"a list":                      {`[]`, "not a JSON object"},
		"no keys":                     {`{}`, "keys is missing"},
		"keys that is null":           {`{"keys":null}`, "keys is missing"},
		"keys twice":                  {`{"keys":[],"keys":[]}`, "duplicate"},
		"text after the end":          {good + "{}", "after"},
		"a sequence that is text":     {`{"keys":[],"spiffe_sequence":"1"}`, "spiffe_sequence"},
		"a sequence with a point":     {`{"keys":[],"spiffe_sequence":1.5}`, "spiffe_sequence"},
		"a hint below zero":           {`{"keys":[],"spiffe_refresh_hint":-1}`, "spiffe_refresh_hint"},
		"a key that is text":          {`{"keys":["x"]}`, "not a JSON object"},
		"a certificate cut short":     {strings.Replace(good, cert(b.X509[0].Raw), cert(b.X509[0].Raw[:99]), 1), "DER"},
		"two certificates in one":     {strings.Replace(good, cert(b.X509[0].Raw), cert(append(b.X509[0].Raw[:len(b.X509[0].Raw):len(b.X509[0].Raw)], b.X509[0].Raw...)), 1), "DER"},
		"a leaf for a CA":             {strings.Replace(good, cert(b.X509[0].Raw), cert(leaf.Raw), 1), "not a CA"},
		"a certificate of other keys": {strings.Replace(good, cert(b.X509[0].Raw), cert(other.X509[0].Raw), 1), "another key"},
		"x5c in base64url":            {strings.Replace(good, cert(b.X509[0].Raw), base64.RawURLEncoding.EncodeToString(b.X509[0].Raw), 1), "base64"},
		"x5c that is text":            {`{"keys":[{"kty":"EC","use":"x509-svid","x5c":"abc"}]}`, "not a list"},
		"53 a JWT key without kid":    {strings.Replace(good, `"kid":"k1",`, "", 1), "kid is missing"},
		"a kid twice":                 {strings.Replace(good, `"kid":"k2"`, `"kid":"k1"`, 1), "twice"},
		"a private key":               {strings.Replace(good, `"kid":"k1"`, `"kid":"k1","d":"AAAA"`, 1), "private key"},
		"a weak RSA key":              {fmt.Sprintf(`{"keys":[{"kty":"RSA","use":"jwt-svid","kid":"k","n":%q,"e":"AQAB"}]}`, n), "2048"},
		"an even exponent":            {fmt.Sprintf(`{"keys":[{"kty":"RSA","use":"jwt-svid","kid":"k","n":%q,"e":"BA"}]}`, b64(weak.N.Bytes())), "exponent"},
		"a small curve":               {fmt.Sprintf(`{"keys":[{"kty":"EC","use":"jwt-svid","kid":"k","crv":"P-224","x":%q,"y":%q}]}`, b64(raw[1:29]), b64(raw[29:])), "crv"},
		"a point off the curve":       {`{"keys":[{"kty":"EC","use":"jwt-svid","kid":"k","crv":"P-256","x":"AAAA","y":"AAAA"}]}`, "not a point"},
		"too large":                   {strings.Repeat(" ", MaxDocument) + good, "at most"},
		"too many keys":               {`{"keys":[` + strings.Repeat(`{},`, maxKeys) + `{}]}`, "256"},
	} {
		got, err := Decode(far, []byte(tt.doc))
		if err == nil || !strings.Contains(err.Error(), tt.say) || !strings.Contains(err.Error(), "far.example") {
			t.Errorf("%s: got %v, %v; want an error that says %q", name, got, err, tt.say)
		}
	}
}

func FuzzDecode(f *testing.F) {
	b, _ := bundleOf(f, far)
	f.Add(encode(f, b))
	f.Add([]byte(`{"keys":[{"kty":"RSA","use":"jwt-svid","kid":"k","n":"AA","e":"AQAB"}],"spiffe_sequence":18446744073709551616}`))
	f.Fuzz(func(t *testing.T, doc []byte) {
		b, err := Decode(far, doc)
		if err != nil {
			return
		}
		again, err := Decode(far, encode(t, b))
		if err != nil || len(again.X509) != len(b.X509) || len(again.JWT) != len(b.JWT) {
			t.Errorf("what we accepted we cannot write: %v", err)
		}
	})
}
