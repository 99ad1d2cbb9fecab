// Package gwconformance runs the conformance tests of the Gateway API for
// HTTPRoute and GRPCRoute against real sidecars, without a cluster.
//
// An issuer and a sidecar before each backend are started, and a sidecar that
// plays the Gateway, whose workload the tests are. The routes of each test are
// imported into the policy, which takes them in force as any other edit.
package gwconformance

import (
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"sigs.k8s.io/gateway-api/conformance/tests"
	"sigs.k8s.io/gateway-api/conformance/utils/config"
	"sigs.k8s.io/gateway-api/conformance/utils/grpc"
	"sigs.k8s.io/gateway-api/conformance/utils/roundtripper"
	"sigs.k8s.io/gateway-api/conformance/utils/suite"
)

// unclaimed are the tests of routes that say what a sidecar does not do, and why.
var unclaimed = map[string]string{
	"HTTPRouteMatchingAcrossRoutes": "an application of the mesh sees its own name as Host, not the one that its caller wrote",
	"HTTPRouteRewriteHost":          "it takes another Host only by the routes of its own service",
	"HTTPRouteCORS":                 "a route that lets every origin call with credentials is refused",
}

// claimed are the tests of what we claim.
var claimed = []suite.ConformanceTest{
	tests.HTTPRouteSimpleSameNamespace, tests.HTTPRouteMatching, tests.HTTPRouteExactPathMatching,
	tests.HTTPRouteHeaderMatching, tests.HTTPRoutePathMatchOrder, tests.HTTPRouteWeight, tests.HTTPRouteCrossNamespace,
	tests.HTTPRouteMethodMatching, tests.HTTPRouteQueryParamMatching,
	tests.HTTPRouteRequestHeaderModifier, tests.HTTPRouteResponseHeaderModifier,
	tests.HTTPRouteRedirectHostAndStatus, tests.HTTPRouteRedirectPath, tests.HTTPRouteRedirectPort, tests.HTTPRouteRedirectScheme,
	tests.HTTPRoute303Redirect, tests.HTTPRoute307Redirect, tests.HTTPRoute308Redirect, tests.HTTPRouteRewritePath,
	tests.HTTPRouteTimeoutRequest, tests.HTTPRouteTimeoutBackendRequest, tests.HTTPRouteNamedRule, tests.HTTPRouteNoBackendRefs, tests.HTTPRouteRetry,
	tests.HTTPRouteRequestMirror, tests.HTTPRouteRequestMultipleMirrors, tests.HTTPRouteRequestPercentageMirror,
	tests.GRPCExactMethodMatching, tests.GRPCRouteHeaderMatching, tests.GRPCRouteWeight, tests.GRPCRouteNamedRule,
}

func TestMain(m *testing.M) { os.Exit(run(m)) }

func TestConformance(t *testing.T) {
	w := &world{dir: os.Getenv(envWorld), bin: os.Getenv(envBin)}
	for _, c := range claimed {
		result.verdict(c.ShortName, t.Run(c.ShortName, func(t *testing.T) { w.conforms(t, c) }))
	}
}

// conforms runs one test with the routes of its manifest.
func (w *world) conforms(t *testing.T, c suite.ConformanceTest) {
	k := newCluster(t, append([]string{"base/manifests.yaml"}, c.Manifests...)...)
	w.use(t, k)
	timeouts := config.DefaultTimeoutConfig()
	timeouts.MaxTimeToConsistency = 10 * time.Second
	timeouts.RouteMustHaveParents, timeouts.GatewayMustHaveAddress = 3*time.Second, 3*time.Second
	c.Test(t, &suite.ConformanceTestSuite{
		Client: k.client, Clientset: w.logs(t), ControllerName: controller, GatewayClassName: "sallyport", TimeoutConfig: timeouts,
		RoundTripper: &roundtripper.DefaultRoundTripper{TimeoutConfig: timeouts}, GRPCClient: &grpc.DefaultClient{},
	})
}

// A verdict is what became of one test.
type verdict struct {
	Name string `json:"name"`
	OK   bool   `json:"ok"`
}

// A sum is the last line that is printed.
type sum struct {
	Name  string `json:"name"`
	OK    bool   `json:"ok"`
	Cases struct {
		Tried   int `json:"tried"`
		Passed  int `json:"passed"`
		Failed  int `json:"failed"`
		Skipped int `json:"skipped"`
	} `json:"cases"`
	// Features are those of which every test was run, Partly those of which some
	// were, and how many.
	Features []string          `json:"features"`
	Partly   map[string]string `json:"partly"`
	// Unclaimed says why others were not.
	Unclaimed map[string]string `json:"unclaimed"`
	Verdicts  []verdict         `json:"verdicts"`
}

var result = &sum{Name: "gwconformance", Unclaimed: unclaimed}

func (s *sum) verdict(name string, ok bool) {
	s.Cases.Tried++
	if ok {
		s.Cases.Passed++
	} else {
		s.Cases.Failed++
	}
	s.Verdicts = append(s.Verdicts, verdict{name, ok})
}

func (s *sum) print() {
	s.OK = s.Cases.Failed == 0 && s.Cases.Tried == len(claimed)
	all, ran := map[string]int{}, map[string]int{}
	for _, c := range tests.ConformanceTests {
		if !strings.HasPrefix(c.ShortName, "HTTPRoute") && !strings.HasPrefix(c.ShortName, "GRPC") {
			continue
		}
		for _, f := range c.Features {
			all[string(f)]++
			if slices.ContainsFunc(claimed, func(x suite.ConformanceTest) bool { return x.ShortName == c.ShortName }) {
				ran[string(f)]++
			}
		}
	}
	delete(ran, "Gateway") // of a cluster, which there is none
	s.Partly = map[string]string{}
	for f, n := range ran {
		if n == all[f] {
			s.Features = append(s.Features, f)
		} else {
			s.Partly[f] = fmt.Sprintf("%d of %d tests", n, all[f])
		}
	}
	slices.Sort(s.Features)
	b, err := json.Marshal(s)
	if err != nil {
		panic(err) // of plain values
	}
	fmt.Printf("%s\n", b)
}
