// Golden vectors against a running server, with Go's standard library alone, over HTTP.
//
//	go run clients/golden/check.go http://localhost:8000 clients/golden/golden.json
package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"reflect"
	"strconv"
)

type golden struct {
	Model struct {
		Name        string `json:"name"`
		Fingerprint string `json:"fingerprint"`
	} `json:"model"`
	Tolerance struct {
		MinCosine float64 `json:"min_cosine"`
	} `json:"tolerance"`
	Texts []struct {
		Text       string    `json:"text"`
		InputIDs   []int64   `json:"input_ids"`
		TextEmbeds []float64 `json:"text_embeds"`
	} `json:"texts"`
	Pictures []struct {
		Name        string    `json:"name"`
		File        []byte    `json:"file"` // encoding/json decodes base64
		ImageEmbeds []float64 `json:"image_embeds"`
	} `json:"pictures"`
}

type tensor struct {
	Name       string           `json:"name"`
	Datatype   string           `json:"datatype"`
	Shape      []int            `json:"shape"`
	Data       json.RawMessage  `json:"data,omitempty"`
	Parameters map[string]int64 `json:"parameters,omitempty"`
}

type client struct{ url string }

// infer sends one input, JSON or followed by raw bytes, and returns the outputs by name.
func (c client) infer(model string, input tensor, raw []byte) (map[string]json.RawMessage, error) {
	header, err := json.Marshal(map[string][]tensor{"inputs": {input}})
	if err != nil {
		return nil, err
	}
	body := bytes.NewReader(append(append([]byte{}, header...), raw...))
	request, err := http.NewRequest("POST", c.url+"/v2/models/"+model+"/infer", body)
	if err != nil {
		return nil, err
	}
	request.Header.Set("Inference-Header-Content-Length", strconv.Itoa(len(header)))
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	answer, err := io.ReadAll(response.Body)
	if err != nil {
		return nil, err
	}
	if response.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s: %s %s", model, response.Status, answer)
	}
	var parsed struct{ Outputs []tensor }
	if err := json.Unmarshal(answer, &parsed); err != nil {
		return nil, err
	}
	outputs := map[string]json.RawMessage{}
	for _, output := range parsed.Outputs {
		outputs[output.Name] = output.Data
	}
	return outputs, nil
}

func (c client) text(model, text string) (map[string]json.RawMessage, error) {
	data, err := json.Marshal([]string{text})
	if err != nil {
		return nil, err
	}
	return c.infer(model, tensor{Name: "text", Datatype: "BYTES", Shape: []int{1, 1}, Data: data}, nil)
}

func (c client) image(model string, file []byte) (map[string]json.RawMessage, error) {
	size := map[string]int64{"binary_data_size": int64(len(file))}
	return c.infer(model, tensor{Name: "image", Datatype: "UINT8", Shape: []int{1, len(file)}, Parameters: size}, file)
}

func numbers[T int64 | float64](data json.RawMessage) (found []T) {
	if json.Unmarshal(data, &found) != nil {
		return nil
	}
	return found
}

func cosine(one, other []float64) (sum float64) {
	if len(one) != len(other) {
		return -1
	}
	for i := range one {
		sum += one[i] * other[i]
	}
	return sum
}

func check(c client, g golden) (wrong []string, err error) {
	for i, entry := range g.Texts {
		ids, err := c.text("tokenize_text", entry.Text)
		if err != nil {
			return nil, err
		}
		if !reflect.DeepEqual(numbers[int64](ids["input_ids"]), entry.InputIDs) {
			wrong = append(wrong, fmt.Sprintf("input_ids of text %d", i))
		}
		answer, err := c.text(g.Model.Name+"_text", entry.Text)
		if err != nil {
			return nil, err
		}
		if cosine(numbers[float64](answer["text_embeds"]), entry.TextEmbeds) < g.Tolerance.MinCosine {
			wrong = append(wrong, fmt.Sprintf("text_embeds of text %d", i))
		}
	}
	for _, entry := range g.Pictures {
		answer, err := c.image(g.Model.Name+"_image", entry.File)
		if err != nil {
			return nil, err
		}
		if cosine(numbers[float64](answer["image_embeds"]), entry.ImageEmbeds) < g.Tolerance.MinCosine {
			wrong = append(wrong, "image_embeds of "+entry.Name)
		}
		if fmt.Sprint(numbers[int64](answer["fingerprint"])) != "["+g.Model.Fingerprint+"]" {
			wrong = append(wrong, "fingerprint: another model is served")
		}
	}
	return wrong, nil
}

func main() {
	content, err := os.ReadFile(os.Args[2])
	var g golden
	if err == nil {
		err = json.Unmarshal(content, &g)
	}
	var wrong []string
	if err == nil {
		wrong, err = check(client{os.Args[1]}, g)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	for _, sentence := range wrong {
		fmt.Println(sentence)
	}
	fmt.Printf("%d texts, %d pictures, %d wrong\n", len(g.Texts), len(g.Pictures), len(wrong))
	if len(wrong) > 0 {
		os.Exit(1)
	}
}
