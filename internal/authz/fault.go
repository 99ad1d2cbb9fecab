package authz

import (
	"strconv"
	"strings"
)

// A FaultCode says why a credential does not count. The set is closed: it is
// the reason of an audit record, and a metric label.
type FaultCode string

// The codes. The client does not learn which.
const (
	FaultRequest     FaultCode = "token_request"     // not one credential in one place
	FaultForm        FaultCode = "token_form"        // not a token that rules could speak of
	FaultIssuer      FaultCode = "token_issuer"      // of nobody whose tokens count here
	FaultKey         FaultCode = "token_key"         // signed by no key of its issuer
	FaultSignature   FaultCode = "token_signature"   //
	FaultExpired     FaultCode = "token_expired"     //
	FaultClaims      FaultCode = "token_claims"      // audience, times, type of claims
	FaultBinding     FaultCode = "token_binding"     // of another key than the caller's
	FaultProof       FaultCode = "token_proof"       // the DPoP proof does not hold
	FaultNonce       FaultCode = "token_nonce"       // the proof lacks our nonce
	FaultReplay      FaultCode = "token_replay"      // the proof was used before
	FaultRevoked     FaultCode = "token_revoked"     //
	FaultAPIKey      FaultCode = "apikey_unknown"    // unknown, or ended
	FaultRate        FaultCode = "apikey_rate"       // more calls than the key may make
	FaultUnavailable FaultCode = "token_unavailable" // its issuer's keys are not known
	FaultInternal    FaultCode = "token_internal"    //
)

// A Fault is a credential that does not count: the call is refused.
type Fault struct {
	Code FaultCode
	// Detail is one sentence for the audit. It never holds any part of the
	// credential.
	Detail string
	// nonce is what the next proof must hold, for FaultNonce.
	nonce string
}

func fault(c FaultCode, detail string) *Fault { return &Fault{Code: c, Detail: detail} }

// Status is what to answer.
func (f *Fault) Status() int {
	switch f.Code {
	case FaultRequest:
		return 400
	case FaultRate:
		return 429
	case FaultUnavailable, FaultInternal:
		return 503
	}
	return 401
}

// quoted keeps a realm from ending its quotes.
func quoted(s string) string {
	return `"` + strings.Map(func(r rune) rune {
		if r == '"' || r == '\\' || r < ' ' || r >= 0x7f {
			return -1
		}
		return r
	}, s) + `"`
}

// Challenge gives the field lines, each ended by CRLF, that tell the client
// what to do about the fault (RFC 6750 section 3, RFC 9449 section 7.1). They
// do not say what was wrong.
func (v *Verifier) Challenge(f *Fault, realm string) string {
	st := v.state.Load()
	switch {
	case st == nil:
		return ""
	case f.Code == FaultRate:
		return "Retry-After: 1\r\n"
	case f.Code == FaultUnavailable || f.Code == FaultInternal:
		return "Retry-After: " + strconv.Itoa(retryKeys) + "\r\n"
	case f.Code == FaultNonce:
		return st.challenge(realm, "", "use_dpop_nonce") + "DPoP-Nonce: " + f.nonce + "\r\n"
	case f.Code == FaultProof || f.Code == FaultReplay:
		return st.challenge(realm, "", "invalid_dpop_proof")
	case f.Code == FaultRequest:
		return st.challenge(realm, "invalid_request", "invalid_request")
	case f.Code == FaultAPIKey:
		return st.challenge(realm, "", "")
	}
	return st.challenge(realm, "invalid_token", "invalid_token")
}

// retryKeys is after how many seconds an issuer is asked for its keys again.
const retryKeys = 30

// Missing is the challenge to a caller that showed no credential (401).
func (v *Verifier) Missing(realm string) string {
	if st := v.state.Load(); st != nil {
		return st.challenge(realm, "", "")
	}
	return ""
}

// Insufficient is the challenge to a caller whose token is good, but not for
// this (403).
func (v *Verifier) Insufficient(realm string) string {
	if st := v.state.Load(); st != nil {
		return st.challenge(realm, "insufficient_scope", "insufficient_scope")
	}
	return ""
}

// challenge writes one line for each scheme that is possible here.
func (st *verifierState) challenge(realm, bearer, dpop string) string {
	var b strings.Builder
	line := func(scheme, rest, code string) {
		b.WriteString("WWW-Authenticate: " + scheme + " realm=" + quoted(realm) + rest)
		if code != "" {
			b.WriteString(`, error="` + code + `"`)
		}
		b.WriteString("\r\n")
	}
	if st.bearer {
		line("Bearer", "", bearer)
	}
	if st.dpop {
		line("DPoP", `, algs="`+strings.Join(proofs.Algs, " ")+`"`, dpop)
	}
	if st.keys != nil {
		line("APIKey", "", "")
	}
	return b.String()
}
