package conform

import (
	"slices"
	"strings"
)

// A Must is one demand of the specifications.
type Must struct {
	Number int
	// Says is the demand, shortened.
	Says string
	// Forms look at it from outside: WorkloadForm, ServerForm.
	Forms []string
	// Tests are ours that show it where nobody outside can see it, each as
	// "folder TestName", or "folder TestName: case" for one row of a table.
	Tests []string
	// Absent is why it does not apply to us; empty when it does.
	Absent string
}

// The two forms of the check.
const (
	WorkloadForm = "workload-api"
	ServerForm   = "server"
)

var (
	api    = []string{WorkloadForm}
	server = []string{ServerForm}
	both   = []string{WorkloadForm, ServerForm}
)

const (
	leafTable   = "internal/svid TestVerifyChainRefusesTheLeaf: "
	jwtTable    = "internal/svid TestVerifyJWT: "
	docTable    = "internal/federation TestDecodeAccepts: "
	peerTable   = "internal/control TestAPeerIsHeldToTheSpecification: "
	lintTable   = "internal/ca TestLintOfLeaves: "
	noWIT       = "we offer no WIT-SVIDs, and the calls for them are Unimplemented"
	noBroker    = "we offer no Broker API"
	noBundleMap = "we neither publish nor read bundle maps"
	noClient    = "we have no client that keeps what a Workload API told it"
)

// Musts are the 134 demands, in the order of their numbers: SPIFFE-ID 1 to 16,
// X509-SVID to 39, JWT-SVID to 55, WIT-SVID to 71, trust domain and bundle to
// 80, federation to 95, Workload Endpoint to 104, Workload API to 120, Broker
// to 134. The list is the caller's.
func Musts() []Must { return slices.Clone(musts) }

var musts = []Must{
	{1, "an ID has the scheme spiffe and a trust domain", both, tests(leafTable + "https scheme"), ""},
	{2, "an ID has no query", both, tests(leafTable + "query"), ""},
	{3, "an ID has no fragment", both, tests(leafTable + "fragment"), ""},
	{4, "an ID has no user and no port", both, tests(leafTable+"user", leafTable+"port"), ""},
	{5, "the trust domain is in lower case when an ID is made", both, tests(leafTable + "upper-case trust domain"), ""},
	{6, "a trust domain has letters, digits, dot, dash and underscore alone", both, nil, ""},
	{7, "a trust domain has no percent-encoding", both, nil, ""},
	{8, "a trust domain that looks like an address is like any other", server, tests("internal/conform TestNames: a trust domain like an address"), ""},
	{9, "a path has no percent-encoding", both, tests(leafTable + "percent-encoding"), ""},
	{10, "a path has no empty segment, no dot and no dot-dot", both, tests(leafTable+"dot segment", leafTable+"empty segment"), ""},
	{11, "a path has no slash at its end", both, tests(leafTable + "trailing slash"), ""},
	{12, "a path has letters, digits, dot, dash and underscore alone", both, nil, ""},
	{13, "an ID of 2048 bytes is accepted", both, tests(leafTable+"longest ID", leafTable+"ID one byte too long"), ""},
	{14, "a trust domain has a signing authority", both, nil, ""},
	{15, "the ID and the public key are in the signed part", both, nil, ""},
	{16, "nothing counts but X509-, JWT- and WIT-SVIDs", api, tests(jwtTable + "typ wit+jwt"), ""},

	{17, "a leaf has exactly one URI name", both, tests(lintTable + "17: no URI"), ""},
	{18, "a leaf with more than one URI name is refused", server, tests(leafTable+"two SPIFFE URIs", leafTable+"a SPIFFE and another URI", peerTable+"18 two names"), ""},
	{19, "the ID of a leaf has a path", both, tests(lintTable + "19 and 33: a root path"), ""},
	{20, "the name is critical when the subject is empty", both, tests(leafTable + "empty subject, SAN not critical"), ""},
	{21, "the ID of a signing certificate has no path", both, tests("internal/svid TestVerifyChainRefusesThePath: intermediate with a workload's ID"), ""},
	{22, "a signing certificate authenticates nobody", server, tests(leafTable+"is a CA", peerTable+"30 cA"), ""},
	{23, "a CA has cA, a leaf has not", both, tests(lintTable + "23 and 30: a leaf that is a CA"), ""},
	{24, "key usage is there and critical", both, tests(leafTable+"no key usage", leafTable+"key usage not critical"), ""},
	{25, "a CA has keyCertSign", both, tests("internal/svid TestVerifyChainRefusesThePath: intermediate that may not sign"), ""},
	{26, "a leaf has digitalSignature", both, tests(leafTable + "only keyEncipherment"), ""},
	{27, "a leaf never has keyCertSign or cRLSign", both, tests(lintTable + "27 and 31: keyCertSign"), ""},
	{28, "extended key usage, if there, has serverAuth and clientAuth", both, tests(leafTable+"only clientAuth", leafTable+"only serverAuth"), ""},
	{29, "a path is verified as RFC 5280 says", both, tests("internal/svid TestVerifyChainRefusesThePath: signed by a leaf", leafTable+"expired"), ""},
	{30, "a leaf with cA is refused", server, tests(leafTable+"is a CA", peerTable+"30 cA"), ""},
	{31, "a leaf with keyCertSign or cRLSign is refused", server, tests(leafTable+"may sign certificates", leafTable+"may sign CRLs", peerTable+"31 keyCertSign"), ""},
	{32, "a leaf whose URI is no SPIFFE ID is refused", server, tests(leafTable+"https scheme", leafTable+"upper-case scheme", peerTable+"32 an https URI"), ""},
	{33, "a leaf whose ID has no path is refused", server, tests(leafTable+"root path", peerTable+"33 no path"), ""},
	{34, "a CA stands in the bundle with use x509-svid", server, tests("internal/federation TestDocumentMusts"), ""},
	{35, "such an element has no kid", server, tests("internal/federation TestDocumentMusts"), ""},
	{36, "its x5c is the base64 DER of the CA", server, tests("internal/federation TestDocumentMusts"), ""},
	{37, "its x5c holds one certificate", server, tests("internal/federation TestDocumentMusts"), ""},
	{38, "such an element without x5c is ignored", server, tests(docTable+"38 without x5c", docTable+"38 with an empty x5c"), ""},
	{39, "all of x5c but its first value is ignored", server, tests(docTable + "39 all but the first x5c are ignored"), ""},

	{40, "a token is in compact serialisation, never JSON", both, tests(jwtTable + "JSON serialisation"), ""},
	{41, "a token has no header beside alg, kid and typ", both, tests(jwtTable+"header jku", jwtTable+"header crit"), ""},
	{42, "alg is one of the nine", both, tests("internal/svid TestVerifyJWT"), ""},
	{43, "any other alg is refused", api, tests(jwtTable+"alg none", jwtTable+"alg HS256", jwtTable+"alg EdDSA"), ""},
	{44, "typ, if there, is JWT or JOSE", both, tests(jwtTable+"typ wit+jwt", jwtTable+"typ JOSE"), ""},
	{45, "sub is the SPIFFE ID", both, nil, ""},
	{46, "aud is there, with a value", both, tests(jwtTable + "aud of mixed types"), ""},
	{47, "a token without aud is refused", api, tests(jwtTable+"no aud", jwtTable+"empty aud"), ""},
	{48, "a token for another audience is refused", api, tests(jwtTable + "other audience"), ""},
	{49, "exp is there", both, tests("internal/ca TestJWT"), ""},
	{50, "a token without exp, or after it, is refused", api, tests(jwtTable+"no exp", jwtTable+"exp past the leeway"), ""},
	{51, "a token is processed as RFC 7519 says", api, tests(jwtTable+"nbf in the future", jwtTable+"signed by another"), ""},
	{52, "a token key stands in the bundle with use jwt-svid", server, tests("internal/federation TestDocumentMusts"), ""},
	{53, "a token key has a kid", both, tests("internal/federation TestDocumentMusts"), ""},
	{54, "only keys with use jwt-svid verify a token", api, tests(jwtTable + "unknown kid"), ""},
	{55, "only the bundle of the subject's trust domain verifies a token", api, tests("internal/svid TestVerifyJWTOfAnotherTrustDomain"), ""},

	{56, "WIT: kid is there, unique to its key", api, nil, noWIT},
	{57, "WIT: typ is wit+jwt", api, nil, noWIT},
	{58, "WIT: alg is one of the nine", api, nil, noWIT},
	{59, "WIT: sub is the SPIFFE ID", api, nil, noWIT},
	{60, "WIT: cnf is there", api, nil, noWIT},
	{61, "WIT: cnf.jwk.alg is one of the nine", api, nil, noWIT},
	{62, "WIT: jti, if there, is unique", api, nil, noWIT},
	{63, "WIT: exp is there", api, nil, noWIT},
	{64, "WIT: a token before its nbf is refused", nil, nil, noWIT},
	{65, "WIT: iat is not taken for nbf", nil, nil, noWIT},
	{66, "WIT: there is no aud", api, nil, noWIT},
	{67, "WIT: nothing is accepted without proof of possession", nil, nil, noWIT},
	{68, "WIT: it is never a bearer token", nil, nil, noWIT},
	{69, "WIT: a proof of possession has a bounded life", nil, nil, noWIT},
	{70, "WIT: its key stands in the bundle with use wit-svid", api, nil, noWIT},
	{71, "WIT: only keys with that use verify it", nil, nil, noWIT},

	{72, "an unknown parameter of a JWK set is not needed", server, tests(docTable + "72 unknown parameters"), ""},
	{73, "spiffe_sequence is an integer that grows with each change", server, tests("internal/federation TestDecodeRefuses: a sequence with a point"), ""},
	{74, "spiffe_refresh_hint is an integer, in seconds", server, tests("internal/federation TestDecodeRefuses: a hint below zero"), ""},
	{75, "keys is there", server, tests("internal/federation TestDecodeRefuses: no keys"), ""},
	{76, "an element of unknown kty or use is ignored", server, tests(docTable+"76 an unknown kty", docTable+"76 an unknown use"), ""},
	{77, "a bundle without keys verifies nobody", server, tests(docTable+"77 nothing at all", "internal/federation TestSelfServingEndpointIsVerifiedWithItsLatestBundle"), ""},
	{78, "an element has kty", both, tests("internal/federation TestDocumentMusts"), ""},
	{79, "an element has use; one without is ignored", server, tests(docTable+"79 no use", docTable+"79 use in upper case"), ""},
	{80, "a bundle map names each trust domain once", nil, nil, noBundleMap},

	{81, "a key is published before its first use", server, tests("internal/ca TestRotationThroughEveryGate"), ""},
	{82, "bundles of two trust domains are never merged", both, tests("internal/federation TestEndpointOfAThirdTrustDomain", leafTable+"other trust domain"), ""},
	{83, "a client knows both profiles, a server one", server, tests("internal/federation TestWebEndpoint"), ""},
	{84, "TLS is that of Mozilla's intermediate profile", server, tests("internal/federation TestServerTLSAsksForNoClientCertificate"), ""},
	{85, "URL, profile and trust domain are configured, never inferred", server, tests("internal/federation TestRelationshipValidate: 85 no profile", "internal/federation TestRelationshipValidate: 85 no domain"), ""},
	{86, "a bundle is handed on under the name of its trust domain", both, tests("internal/svid TestFederatedPeerIsVerifiedByItsOwnBundle"), ""},
	{87, "the URL is https, without user", server, tests("internal/federation TestRelationshipValidate: 87 http", "internal/federation TestRelationshipValidate: 87 user"), ""},
	{88, "https_web: the certificate names the host", server, tests("internal/federation TestWebEndpoint"), ""},
	{89, "an endpoint demands no client certificate", server, tests("internal/federation TestServerTLSAsksForNoClientCertificate"), ""},
	{90, "GET gives the newest bundle, in UTF-8", server, tests("internal/federation TestPublishedDocuments"), ""},
	{91, "a redirect leads only to a URL that could be configured", server, tests("internal/federation TestRedirects"), ""},
	{92, "https_spiffe: the endpoint proves exactly its ID", server, tests("internal/federation TestEndpointMustProveExactlyItsIdentity"), ""},
	{93, "a client takes the first bundle in SPIFFE format", api, tests("cmd/issuer TestTwoTrustDomainsFederate"), ""},
	{94, "self-serving: the latest bundle verifies the endpoint", server, tests("internal/federation TestSelfServingEndpointIsVerifiedWithItsLatestBundle"), ""},
	{95, "not self-serving: the endpoint's trust domain is configured apart", server, tests("internal/federation TestEndpointOfAThirdTrustDomain"), ""},

	{96, "the endpoint speaks gRPC", api, nil, ""},
	{97, "TCP is used only where the source address is bound strongly", nil, tests("internal/svid TestOtherListenersAreRefused"), ""},
	{98, "a request without workload.spiffe.io: true is refused", api, tests("internal/svid TestWorkloadAPIRefuses"), ""},
	{99, "TLS is not demanded", api, nil, ""},
	{100, "a client without an address uses SPIFFE_ENDPOINT_SOCKET", nil, tests("test TestConformWorkloadAPI"), ""},
	{101, "the address is unix with an absolute path, or tcp with IP and port", nil, tests("internal/conform TestEndpoint"), ""},
	{102, "a workload need show nothing and do nothing", api, nil, ""},
	{103, "the service is not extended", api, nil, ""},
	{104, "the Workload API is always there", api, nil, ""},

	{105, "the X.509 and JWT profiles are there", api, nil, ""},
	{106, "each message of a stream is the whole state", api, tests("internal/svid TestStreamFollowsTheState"), ""},
	{107, "the first answer comes at once", api, nil, ""},
	{108, "a client drops what a message no longer has", nil, nil, noClient},
	{109, "X.509 bundles hold CAs for X509-SVIDs alone", api, nil, ""},
	{110, "there is at least one SVID", api, nil, ""},
	{111, "a hint is unique in its answer", api, nil, ""},
	{112, "the own trust domain is in FetchX509Bundles", api, nil, ""},
	{113, "a JWT-SVID has the audience that was asked for, and needs one", api, tests("internal/svid TestFetchJWT"), ""},
	{114, "without spiffe_id there is one for each identity", api, tests("internal/svid TestFetchJWT"), ""},
	{115, "the own trust domain is in FetchJWTBundles", api, nil, ""},
	{116, "JWT bundles hold no keys of other uses", api, tests("internal/svid TestJWTBundleHoldsOnlyTheKeys"), ""},
	{117, "ValidateJWTSVID validates as the specification says", api, tests("internal/svid TestValidateJWTSVID"), ""},
	{118, "ValidateJWTSVID uses the bundle of the subject's trust domain", api, tests("internal/svid TestVerifyJWTOfAnotherTrustDomain"), ""},
	{119, "WIT calls that are not offered are Unimplemented", api, nil, ""},
	{120, "WIT calls that are offered keep 106 to 116", api, nil, noWIT},

	{121, "Broker: mutual TLS with X509-SVIDs", nil, nil, noBroker},
	{122, "Broker: the header broker.spiffe.io", nil, nil, noBroker},
	{123, "Broker: SPIFFE_BROKER_SOCKET", nil, nil, noBroker},
	{124, "Broker: only listed brokers are served", nil, nil, noBroker},
	{125, "Broker: one reference in a request", nil, nil, noBroker},
	{126, "Broker: references are resolved by the server", nil, nil, noBroker},
	{127, "Broker: references do not cross nodes", nil, nil, noBroker},
	{128, "Broker: a PID is above zero and the workload's", nil, nil, noBroker},
	{129, "Broker: a Kubernetes reference is whole and matches", nil, nil, noBroker},
	{130, "Broker: answers are apart for each workload", nil, nil, noBroker},
	{131, "Broker: the codes of errors", nil, nil, noBroker},
	{132, "Broker: it ends when the workload ends", nil, nil, noBroker},
	{133, "Broker: each message is the whole state", nil, nil, noBroker},
	{134, "Broker: both profiles are there", nil, nil, noBroker},
}

func tests(names ...string) []string { return names }

// Page is the table of docs/conformance.md: each demand and where it is shown.
func Page() string {
	var b strings.Builder
	b.WriteString("| # | demand | shown by |\n|---|---|---|\n")
	for _, m := range musts {
		b.WriteString(m.row())
	}
	return b.String()
}
