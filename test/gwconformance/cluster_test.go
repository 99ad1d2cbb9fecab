package gwconformance

import (
	"bytes"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	gw "sigs.k8s.io/gateway-api/apis/v1"
	"sigs.k8s.io/gateway-api/apis/v1beta1"
	"sigs.k8s.io/gateway-api/conformance"
	"sigs.k8s.io/yaml"
)

const controller = "sallyport.example/sidecar"

// A cluster is what the tests of the Gateway API look for in Kubernetes: the
// documents of a test with the status that a controller would have written.
type cluster struct {
	client client.Client
	routes bytes.Buffer // the documents of routes, as they are written
}

// newCluster reads manifests. A Gateway is one loopback address.
func newCluster(t *testing.T, files ...string) *cluster {
	t.Helper()
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{gw.Install, v1beta1.Install, corev1.AddToScheme} {
		if err := add(scheme); err != nil {
			t.Fatal(err)
		}
	}
	c := &cluster{}
	var objects []client.Object
	for _, f := range files {
		b, err := conformance.Manifests.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		b = bytes.ReplaceAll(b, []byte("{GATEWAY_CLASS_NAME}"), []byte("sallyport"))
		for _, doc := range bytes.Split(b, []byte("\n---")) {
			if o := c.object(t, doc); o != nil {
				objects = append(objects, o)
			}
		}
	}
	c.client = fake.NewClientBuilder().WithScheme(scheme).WithObjects(append(objects, pods()...)...).Build()
	return c
}

// object reads a document; nil is one that no test looks for.
func (c *cluster) object(t *testing.T, doc []byte) client.Object {
	t.Helper()
	var kind metav1.TypeMeta
	if err := yaml.Unmarshal(doc, &kind); err != nil {
		t.Fatal(err)
	}
	into := func(o client.Object) client.Object {
		if err := yaml.UnmarshalStrict(doc, o); err != nil {
			t.Fatal(err)
		}
		return o
	}
	switch kind.Kind {
	case "Gateway":
		g := into(&gw.Gateway{}).(*gw.Gateway)
		ip := gw.IPAddressType
		g.Status.Addresses = []gw.GatewayStatusAddress{{Type: &ip, Value: gatewayIP}}
		g.Status.Conditions = conditions("Accepted", "Programmed")
		for _, l := range g.Spec.Listeners {
			kinds := []gw.RouteGroupKind{{Kind: "HTTPRoute"}, {Kind: "GRPCRoute"}}
			g.Status.Listeners = append(g.Status.Listeners, gw.ListenerStatus{Name: l.Name, SupportedKinds: kinds, AttachedRoutes: 1, Conditions: conditions("Accepted", "Programmed", "ResolvedRefs")})
		}
		return g
	case "HTTPRoute":
		r := into(&gw.HTTPRoute{}).(*gw.HTTPRoute)
		r.Status.RouteStatus = accepted(r.Spec.ParentRefs)
		c.keep(doc)
		return r
	case "GRPCRoute":
		r := into(&gw.GRPCRoute{}).(*gw.GRPCRoute)
		r.Status.RouteStatus = accepted(r.Spec.ParentRefs)
		c.keep(doc)
		return r
	case "Service":
		return into(&corev1.Service{})
	case "Namespace":
		return into(&corev1.Namespace{})
	}
	return nil
}

// keep adds a document to those that are imported.
func (c *cluster) keep(doc []byte) {
	c.routes.WriteString("\n---\n")
	c.routes.Write(doc)
}

// accepted is the status of a route that all its parents take.
func accepted(parents []gw.ParentReference) (s gw.RouteStatus) {
	group, kind := gw.Group(gw.GroupName), gw.Kind("Gateway")
	for i := range parents {
		p := &parents[i]
		if p.Group == nil {
			p.Group = &group
		}
		if p.Kind == nil {
			p.Kind = &kind
		}
		s.Parents = append(s.Parents, gw.RouteParentStatus{ParentRef: *p, ControllerName: controller, Conditions: conditions("Accepted", "ResolvedRefs")})
	}
	return s
}

func conditions(types ...string) (out []metav1.Condition) {
	for _, t := range types {
		meta.SetStatusCondition(&out, metav1.Condition{Type: t, Status: metav1.ConditionTrue, Reason: t})
	}
	return out
}
