package authz

import (
	"errors"
	"fmt"
	"strings"

	"sallyport/internal/jose"
	"sallyport/internal/mesh"
)

// A Token is what a verified token or API key says of the caller. A Verifier
// makes one; no condition on tokens holds without it. It is not changed once
// made.
type Token struct {
	// Issuer is what iss= compares with: the claim iss, the ID of the trust
	// domain of a JWT-SVID, or "apikey".
	Issuer, Subject string
	Audience        []string
	Scopes          map[string]bool
	// Claims are those with one value: text, a number or a truth value.
	Claims map[string]string
	// Bound means that the token is bound to the key that the caller has just
	// proved to hold (RFC 8705, RFC 9449).
	Bound bool
	// ACR is the authentication context class, as a number.
	ACR int

	// fields are the lines that tell the application, ended by CRLF, and ours
	// says that Authorization held it and was for us alone.
	fields []byte
	ours   bool
	// record names the token in the audit.
	record string
	basis  basis
}

// Fields are the field lines, each ended by CRLF, that tell the application of
// the claims.
func (t *Token) Fields() []byte { return t.fields }

// Ours says that the field Authorization is not to reach the application: it
// held the token, and the issuer's entry does not forward it.
func (t *Token) Ours() bool { return t.ours }

// detail is what the audit says of the caller's token: never the token.
func (t *Token) detail() string {
	if t == nil {
		return ""
	}
	return t.record
}

// tokenOf reads the claims of a token that was verified.
func tokenOf(is *issuer, t *jose.Token, sub string, cnf confirmation) (*Token, error) {
	out := &Token{
		Issuer: is.name, Subject: sub, Scopes: map[string]bool{}, Claims: map[string]string{},
		Bound: cnf.bound(), ours: !is.cfg.Forward,
	}
	var err error
	if out.Audience, err = t.Claims.Texts("aud", mesh.MaxAudiences); err != nil {
		return nil, err
	}
	if err := scopes(t.Claims, out.Scopes); err != nil {
		return nil, err
	}
	for name, v := range t.Claims {
		if s, ok := scalar(v); ok {
			out.Claims[name] = s
		}
	}
	out.ACR = level(out.Claims["acr"])
	for _, h := range is.cfg.Headers {
		if v, ok := out.Claims[h.Claim]; ok {
			out.fields = appendField(out.fields, h.Header, v)
		}
	}
	out.record = recordText(out, t)
	return out, nil
}

// scopes reads scope, texts between blanks (RFC 8693), and scp, which some
// issuers write as a list.
func scopes(claims jose.Object, into map[string]bool) error {
	v, has := claims["scope"]
	s, ok := v.(string)
	if has && !ok {
		return errors.New("scope is not a text")
	}
	for one := range strings.SplitSeq(s, " ") {
		if one != "" {
			into[one] = true
		}
	}
	if _, has := claims["scp"]; has {
		list, err := claims.Texts("scp", mostScopes)
		if err != nil {
			return err
		}
		if _, one := claims["scp"].(string); one {
			list = strings.Fields(list[0])
		}
		for _, one := range list {
			into[one] = true
		}
	}
	if len(into) > mostScopes {
		return fmt.Errorf("token has more than %d scopes", mostScopes)
	}
	return nil
}

const mostScopes = 64

// scalar gives the text of a claim that has one value.
func scalar(v any) (string, bool) {
	switch v := v.(type) {
	case string:
		return v, true
	case bool:
		if v {
			return "true", true
		}
		return "false", true
	case fmt.Stringer: // json.Number
		return v.String(), true
	}
	return "", false
}

// level reads an acr that is a number; any other counts as none.
func level(s string) int {
	n := 0
	for _, c := range s {
		if c < '0' || c > '9' || n > 255 {
			return 0
		}
		n = 10*n + int(c-'0')
	}
	return min(n, 255)
}

const mostField = 1 << 10 // bytes of a claim in a header

// appendField writes a field line. What is not printable ASCII, and '%', is
// written as %XX; a claim that is too long is left out.
func appendField(b []byte, name, value string) []byte {
	if len(value) > mostField {
		return b
	}
	const hex = "0123456789ABCDEF"
	b = append(append(b, name...), ": "...)
	for i := range len(value) {
		c := value[i]
		edge := i == 0 || i == len(value)-1
		if c < ' ' || c >= 0x7f || c == '%' || c == ' ' && edge {
			b = append(b, '%', hex[c>>4], hex[c&15])
		} else {
			b = append(b, c)
		}
	}
	return append(b, "\r\n"...)
}

// recordText names the token without giving anything that could be shown for
// it: of jti only a hash.
func recordText(t *Token, from *jose.Token) string {
	s := fmt.Sprintf("token of %q for %.256q", t.Issuer, t.Subject)
	if from.KeyID != "" {
		s += fmt.Sprintf(", kid %q", from.KeyID)
	}
	if jti := t.Claims["jti"]; jti != "" {
		s += ", jti sha256:" + shortHash(jti)
	}
	if t.Bound {
		s += ", bound"
	}
	return s
}
