package kubernetes

import (
	"os"
	"strings"
	"testing"

	"github.com/google/cel-go/cel"
	admission "k8s.io/api/admissionregistration/v1"
	"sigs.k8s.io/yaml"
)

// conditions are those of the injector's webhooks, by name.
func conditions(t *testing.T) map[string]string {
	t.Helper()
	b, err := os.ReadFile("../../deploy/kubernetes/injector.yaml")
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	for _, doc := range strings.Split(string(b), "\n---\n") {
		var c admission.MutatingWebhookConfiguration
		if err := yaml.Unmarshal([]byte(doc), &c); err != nil || c.Kind != "MutatingWebhookConfiguration" {
			continue
		}
		for _, w := range c.Webhooks {
			for _, m := range w.MatchConditions {
				out[m.Name] = m.Expression
			}
		}
	}
	return out
}

// pod is one of containers and of init containers, by name and image.
func pod(labels string, containers, inits []string) map[string]any {
	list := func(of []string) []any {
		out := []any{}
		for _, c := range of {
			name, image, _ := strings.Cut(c, "=")
			out = append(out, map[string]any{"name": name, "image": image})
		}
		return out
	}
	spec := map[string]any{"containers": list(containers)}
	if inits != nil {
		spec["initContainers"] = list(inits)
	}
	return map[string]any{"metadata": map[string]any{"labels": map[string]any{"app": labels}}, "spec": spec}
}

// The webhook is asked about an update that changes an image, whichever, and about
// no other: the kubelet updates pods all the time.
func TestTheWebhookIsAskedWhenAnImageChanges(t *testing.T) {
	text, ok := conditions(t)["an-image-changes"]
	if !ok {
		t.Fatal("there is no such condition")
	}
	env, err := cel.NewEnv(cel.Variable("object", cel.DynType), cel.Variable("oldObject", cel.DynType))
	if err != nil {
		t.Fatal(err)
	}
	ast, issues := env.Compile(text)
	if issues.Err() != nil {
		t.Fatal(issues.Err())
	}
	if !ast.OutputType().IsExactType(cel.BoolType) {
		t.Errorf("it is a %s, not a bool", ast.OutputType())
	}
	prg, err := env.Program(ast)
	if err != nil {
		t.Fatal(err)
	}
	app, side := []string{"app=a:1"}, []string{"sallyport=s:1"}
	for _, tt := range []struct {
		name     string
		old, new map[string]any
		want     bool
	}{
		{"nothing", pod("x", app, side), pod("x", app, side), false},
		{"a label", pod("x", app, side), pod("y", app, side), false},
		{"an image", pod("x", app, side), pod("x", []string{"app=a:2"}, side), true},
		{"the image of the sidecar", pod("x", app, side), pod("x", app, []string{"sallyport=evil:1"}), true},
		{"the second of two", pod("x", []string{"app=a:1", "log=l:1"}, side), pod("x", []string{"app=a:1", "log=l:2"}, side), true},
		{"two images that are swapped", pod("x", []string{"app=a:1", "log=l:1"}, side), pod("x", []string{"app=l:1", "log=a:1"}, side), true},
		{"nothing of a pod without init containers", pod("x", app, nil), pod("y", app, nil), false},
		{"an image of a pod without init containers", pod("x", app, nil), pod("x", []string{"app=a:2"}, nil), true},
		{"both", pod("x", app, side), pod("x", []string{"app=a:2"}, []string{"sallyport=s:2"}), true},
	} {
		got, _, err := prg.Eval(map[string]any{"object": tt.new, "oldObject": tt.old})
		if err != nil || got.Value() != tt.want {
			t.Errorf("%s changes: %v, %v; want %t", tt.name, got, err, tt.want)
		}
	}
}
