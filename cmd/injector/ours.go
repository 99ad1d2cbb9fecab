package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
)

// accountDir is where Kubernetes mounts the token for itself into every container.
const accountDir = "/var/run/secrets/kubernetes.io/serviceaccount"

// filled are the fields that Kubernetes fills in, or a LimitRange, and that make
// nothing else of a container.
var filled = map[string]bool{
	"imagePullPolicy": true, "terminationMessagePath": true, "terminationMessagePolicy": true, "resources": true,
	"protocol": true, "apiVersion": true, "defaultMode": true,
	"timeoutSeconds": true, "successThreshold": true, "resizePolicy": true,
}

// ours says why what stands in the pod under the sidecar's names is not what would
// be added now. The sidecar's user is not captured, so that nobody may have it run
// another image, another command or a probe, nor hand it another configuration.
func (p *pod) ours(text []byte, cfg *Config) error {
	var got struct {
		Spec struct {
			InitContainers []map[string]any `json:"initContainers"`
			Volumes        []map[string]any `json:"volumes"`
		} `json:"spec"`
	}
	if err := json.Unmarshal(text, &got); err != nil {
		return fmt.Errorf("the pod cannot be read: %w", err)
	}
	const advice = "; leave out what is named " + prefix + "*, it is added"
	for i, want := range []object{p.capture(cfg), p.sidecar(cfg)} {
		name := want["name"].(string)
		if i >= len(got.Spec.InitContainers) || got.Spec.InitContainers[i]["name"] != name {
			return fmt.Errorf("init container %s: not in its place, which is %d: what starts before is not captured%s", name, i, advice)
		}
		c := got.Spec.InitContainers[i]
		withoutAccount(c)
		if at, ok := same(plain(want), c, ""); !ok {
			return fmt.Errorf("init container %s:%s is not as the injector makes it%s", name, at, advice)
		}
	}
	for _, v := range volumes(cfg) {
		want := plain(v).(map[string]any)
		found := false
		for _, g := range got.Spec.Volumes {
			if g["name"] != want["name"] {
				continue
			}
			found = true
			if at, ok := same(want, g, ""); !ok {
				return fmt.Errorf("volume %s:%s is not as the injector makes it%s", g["name"], at, advice)
			}
		}
		if !found {
			return fmt.Errorf("volume %s: missing%s", want["name"], advice)
		}
	}
	if p.Spec.Share == nil {
		return errors.New("shareProcessNamespace: not true, so that the workload is hidden from its sidecar" + advice)
	}
	return nil
}

// withoutAccount takes out what Kubernetes mounts into every container.
func withoutAccount(c map[string]any) {
	list, _ := c["volumeMounts"].([]any)
	var rest []any
	for _, m := range list {
		if o, ok := m.(map[string]any); !ok || o["mountPath"] != accountDir || o["readOnly"] != true || o["subPath"] != nil {
			rest = append(rest, m)
		}
	}
	c["volumeMounts"] = rest
}

// plain is a value as JSON gives it back.
func plain(v any) (out any) {
	b, err := json.Marshal(v)
	if err != nil {
		return nil
	}
	_ = json.Unmarshal(b, &out)
	return out
}

// same compares what is wanted with what is there, which may have more in it where
// Kubernetes fills it in; at is where they differ.
func same(want, got any, at string) (string, bool) {
	switch w := want.(type) {
	case map[string]any:
		g, ok := got.(map[string]any)
		if !ok {
			return at, false
		}
		for k := range g {
			if _, known := w[k]; !known && !filled[k] && (k != "procMount" || g[k] != "Default") {
				return at + " " + k, false
			}
		}
		for k, v := range w {
			if k == "resources" {
				continue
			}
			if at, ok := same(v, g[k], at+" "+k); !ok {
				return at, false
			}
		}
	case []any:
		g, ok := got.([]any)
		if !ok || len(g) != len(w) {
			return at, false
		}
		for i := range w {
			if at, ok := same(w[i], g[i], fmt.Sprintf("%s %d", at, i)); !ok {
				return at, false
			}
		}
	default:
		return at, reflect.DeepEqual(want, got)
	}
	return at, true
}

// keeps says what is wrong with a change of a pod that runs: of a container, its
// image alone can change, and the image of ours is the sidecar itself. It may
// become the one that pods are given now.
func keeps(before, after []byte, cfg *Config) error {
	images := map[string]string{}
	var p pod
	if err := json.Unmarshal(before, &p); err != nil {
		return fmt.Errorf("the pod as it was cannot be read: %w", err)
	}
	for _, c := range slices.Concat(p.Spec.InitContainers, p.Spec.Containers) {
		images[c.Name] = c.Image
	}
	p = pod{}
	if err := json.Unmarshal(after, &p); err != nil {
		return fmt.Errorf("the pod cannot be read: %w", err)
	}
	for _, c := range slices.Concat(p.Spec.InitContainers, p.Spec.Containers) {
		if strings.HasPrefix(c.Name, prefix) && c.Image != images[c.Name] && c.Image != cfg.Image {
			return fmt.Errorf("container %s: its image is the sidecar's, and changes to %q alone, the one that pods are given", c.Name, cfg.Image)
		}
	}
	return nil
}
