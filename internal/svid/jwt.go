package svid

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	_ "crypto/sha256" // for crypto.SHA256.New
	_ "crypto/sha512" // for crypto.SHA384.New and SHA512
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/big"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"
)

const (
	maxJWT   = 8 << 10 // bytes; a JWT-SVID has a few hundred
	maxDepth = 8       // of nested JSON
	jwtSkew  = 30 * time.Second
)

// A jwtAlg is one of the nine that JWT-SVID section 2.1 allows.
type jwtAlg struct {
	kind string // "ES", "RS" or "PS"
	hash crypto.Hash
	bits int // of the curve, for ES
}

var jwtAlgs = map[string]jwtAlg{
	"ES256": {"ES", crypto.SHA256, 256}, "ES384": {"ES", crypto.SHA384, 384}, "ES512": {"ES", crypto.SHA512, 521},
	"RS256": {"RS", crypto.SHA256, 0}, "RS384": {"RS", crypto.SHA384, 0}, "RS512": {"RS", crypto.SHA512, 0},
	"PS256": {"PS", crypto.SHA256, 0}, "PS384": {"PS", crypto.SHA384, 0}, "PS512": {"PS", crypto.SHA512, 0},
}

// VerifyJWT checks a JWT-SVID of the state's trust domain or a federated one,
// addressed to audience, and gives its subject and claims. Only keys of the
// subject's own trust domain count. It refuses more than go-spiffe
// does: any header beside alg, kid and typ, duplicate names, a token without
// audience whoever asks, a subject without path, numbers that overflow time.
func (st *State) VerifyJWT(token, audience string, now time.Time) (spiffeid.ID, map[string]any, error) {
	id, claims, err := st.verifyJWT(token, audience, now)
	if err != nil {
		return spiffeid.ID{}, nil, fmt.Errorf("verify JWT-SVID: %w", err)
	}
	return id, claims, nil
}

func (st *State) verifyJWT(token, audience string, now time.Time) (spiffeid.ID, map[string]any, error) {
	if len(token) > maxJWT {
		return spiffeid.ID{}, nil, fmt.Errorf("token of %d bytes, want at most %d", len(token), maxJWT)
	}
	part := strings.Split(token, ".")
	if len(part) != 3 {
		return spiffeid.ID{}, nil, fmt.Errorf("token has %d parts, want 3", len(part))
	}
	var raw [3][]byte
	for i, p := range part {
		// The decoder skips line ends even when strict.
		if p == "" || strings.ContainsAny(p, "\r\n") {
			return spiffeid.ID{}, nil, errors.New("token is not base64url")
		}
		b, err := base64.RawURLEncoding.Strict().DecodeString(p)
		if err != nil {
			return spiffeid.ID{}, nil, errors.New("token is not base64url")
		}
		raw[i] = b
	}
	alg, kid, err := jwtHeader(raw[0])
	if err != nil {
		return spiffeid.ID{}, nil, err
	}
	claims, err := JSONObject(raw[1])
	if err != nil {
		return spiffeid.ID{}, nil, fmt.Errorf("claims: %w", err)
	}
	// The subject is not believed yet: it only chooses the keys.
	sub, _ := claims["sub"].(string)
	id, err := spiffeid.FromString(sub)
	if err != nil {
		return spiffeid.ID{}, nil, errors.New("sub is not a SPIFFE ID")
	}
	keys := st.JWTKeys
	if id.TrustDomain() != st.Bundle.TrustDomain() {
		if keys = st.FederatedJWT[id.TrustDomain()]; len(keys) == 0 {
			return spiffeid.ID{}, nil, fmt.Errorf("no bundle for trust domain %s", id.TrustDomain())
		}
	}
	key, ok := keys[kid]
	if !ok {
		return spiffeid.ID{}, nil, errors.New("no key of the bundle has this key ID")
	}
	if err := alg.verify(key, []byte(part[0]+"."+part[1]), raw[2]); err != nil {
		return spiffeid.ID{}, nil, err
	}
	if err := checkTimes(claims, now); err != nil {
		return spiffeid.ID{}, nil, err
	}
	if err := checkAud(claims["aud"], audience); err != nil {
		return spiffeid.ID{}, nil, err
	}
	if id.Path() == "" || len(sub) > maxID {
		return spiffeid.ID{}, nil, errors.New("sub has no path or is too long")
	}
	return id, claims, nil
}

// jwtHeader settles the algorithm before anything else is looked at.
func jwtHeader(b []byte) (jwtAlg, string, error) {
	h, err := JSONObject(b)
	if err != nil {
		return jwtAlg{}, "", fmt.Errorf("header: %w", err)
	}
	name, _ := h["alg"].(string)
	alg, ok := jwtAlgs[name]
	if !ok {
		return jwtAlg{}, "", errors.New("alg is not one of RS, ES, PS with 256, 384, 512")
	}
	for k := range h {
		if k != "alg" && k != "kid" && k != "typ" {
			return jwtAlg{}, "", errors.New("header has a name beside alg, kid and typ")
		}
	}
	if typ, has := h["typ"]; has && typ != "JWT" && typ != "JOSE" {
		return jwtAlg{}, "", errors.New("typ is neither JWT nor JOSE")
	}
	kid, _ := h["kid"].(string)
	if kid == "" {
		return jwtAlg{}, "", errors.New("kid is missing")
	}
	return alg, kid, nil
}

func (a jwtAlg) verify(key crypto.PublicKey, signed, sig []byte) error {
	h := a.hash.New()
	h.Write(signed)
	sum := h.Sum(nil)
	wrong := errors.New("signature is wrong")
	switch k := key.(type) {
	case *ecdsa.PublicKey:
		size := (a.bits + 7) / 8
		if a.kind != "ES" || k.Params().BitSize != a.bits {
			return errors.New("alg does not fit the key")
		}
		if len(sig) != 2*size || !ecdsa.Verify(k, sum, new(big.Int).SetBytes(sig[:size]), new(big.Int).SetBytes(sig[size:])) {
			return wrong
		}
	case *rsa.PublicKey:
		if a.kind == "ES" || k.N.BitLen() < minRSA {
			return errors.New("alg does not fit the key")
		}
		var err error
		if a.kind == "PS" {
			err = rsa.VerifyPSS(k, a.hash, sum, sig, &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash})
		} else {
			err = rsa.VerifyPKCS1v15(k, a.hash, sum, sig)
		}
		if err != nil {
			return wrong
		}
	default:
		return errors.New("alg does not fit the key")
	}
	return nil
}

func checkTimes(claims map[string]any, now time.Time) error {
	exp, has, err := numericDate(claims, "exp")
	if err != nil {
		return err
	}
	if !has {
		return errors.New("exp is missing")
	}
	if !now.Before(exp.Add(jwtSkew)) {
		return fmt.Errorf("token: %w", ErrExpired)
	}
	for _, name := range []string{"nbf", "iat"} {
		at, has, err := numericDate(claims, name)
		if err != nil {
			return err
		}
		if has && now.Add(jwtSkew).Before(at) {
			return fmt.Errorf("%s is in the future: check both clocks", name)
		}
	}
	return nil
}

// numericDate takes seconds as a whole or decimal number below 2^53, so that
// no value can overflow into the past.
func numericDate(claims map[string]any, name string) (time.Time, bool, error) {
	v, has := claims[name]
	if !has {
		return time.Time{}, false, nil
	}
	n, ok := v.(json.Number)
	if !ok {
		return time.Time{}, true, fmt.Errorf("%s is not a number", name)
	}
	f, err := n.Float64()
	if err != nil || f <= 0 || f >= 1<<53 {
		return time.Time{}, true, fmt.Errorf("%s is out of range", name)
	}
	return time.Unix(int64(f), 0), true, nil
}

func checkAud(v any, audience string) error {
	if audience == "" {
		return errors.New("no audience to check against")
	}
	list, ok := v.([]any)
	if s, one := v.(string); one {
		list, ok = []any{s}, true
	}
	if !ok || len(list) == 0 || len(list) > maxAudiences {
		return fmt.Errorf("aud is missing, or not 1 to %d strings", maxAudiences)
	}
	for _, a := range list {
		if s, ok := a.(string); !ok || s == "" {
			return errors.New("aud holds something else than strings")
		}
	}
	if !slices.Contains(list, any(audience)) {
		return errors.New("token is for another audience")
	}
	return nil
}

// JSONObject decodes exactly one object, without duplicate names at any depth and
// without numbers losing digits (they are json.Number). No error quotes the text.
func JSONObject(b []byte) (map[string]any, error) {
	if !utf8.Valid(b) {
		return nil, errors.New("not UTF-8")
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.UseNumber()
	v, err := jsonValue(d, 0)
	if err != nil {
		return nil, err
	}
	o, ok := v.(map[string]any)
	if !ok {
		return nil, errors.New("not a JSON object")
	}
	if _, err := d.Token(); err != io.EOF {
		return nil, errors.New("bytes after the JSON object")
	}
	return o, nil
}

func jsonValue(d *json.Decoder, depth int) (any, error) {
	t, err := d.Token()
	if err != nil {
		return nil, errors.New("malformed JSON")
	}
	if t != json.Delim('{') && t != json.Delim('[') {
		return t, nil
	}
	if depth == maxDepth {
		return nil, fmt.Errorf("JSON nested deeper than %d", maxDepth)
	}
	object, array := map[string]any{}, []any{}
	for d.More() {
		name := ""
		if t == json.Delim('{') {
			k, err := d.Token()
			if err != nil {
				return nil, errors.New("malformed JSON")
			}
			name = k.(string) // the decoder allows nothing else before a colon
			if _, twice := object[name]; twice {
				return nil, errors.New("duplicate name in JSON")
			}
		}
		v, err := jsonValue(d, depth+1)
		if err != nil {
			return nil, err
		}
		if t == json.Delim('{') {
			object[name] = v
		} else {
			array = append(array, v)
		}
	}
	if _, err := d.Token(); err != nil {
		return nil, errors.New("malformed JSON")
	}
	if t == json.Delim('{') {
		return object, nil
	}
	return array, nil
}

// ValidateJWTSVID checks a token for a workload that cannot do so itself.
func (w *WorkloadAPI) ValidateJWTSVID(ctx context.Context, r *workload.ValidateJWTSVIDRequest) (*workload.ValidateJWTSVIDResponse, error) {
	if r.Audience == "" || r.Svid == "" {
		return nil, status.Error(codes.InvalidArgument, "audience and svid must be given")
	}
	g, err := w.attest(ctx, "ValidateJWTSVID", spiffeid.ID{})
	if err != nil {
		return nil, err
	}
	id, claims, err := g.state.VerifyJWT(r.Svid, r.Audience, w.cfg.Source.now())
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	if td := id.TrustDomain(); td != g.state.Bundle.TrustDomain() && g.federated()[td] == nil {
		return nil, status.Errorf(codes.InvalidArgument, "verify JWT-SVID: no bundle for trust domain %s", td)
	}
	s, err := structpb.NewStruct(plainNumbers(claims).(map[string]any))
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, "claims cannot be represented")
	}
	return &workload.ValidateJWTSVIDResponse{SpiffeId: id.String(), Claims: s}, nil
}

// plainNumbers turns json.Number, which protobuf does not know, into float64.
func plainNumbers(v any) any {
	switch v := v.(type) {
	case json.Number:
		f, err := v.Float64()
		if err != nil {
			return v.String()
		}
		return f
	case map[string]any:
		for k := range v {
			v[k] = plainNumbers(v[k])
		}
	case []any:
		for i := range v {
			v[i] = plainNumbers(v[i])
		}
	}
	return v
}
